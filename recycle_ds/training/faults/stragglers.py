"""Ranks that are slower than the others: each times what it does by itself, before it waits for anybody."""

from __future__ import annotations

import socket
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from recycle_ds.model import RecycleGPT
from recycle_ds.parallel.mesh import Mesh


class WorkTimer:
    """Times a rank's reading of data and its forward passes.

    A step as a whole takes all ranks the same time, for they wait for one another. A forward pass waits for nobody in data
    parallelism at ZeRO 0 to 2; under tensor, sequence and Ulysses parallelism and ZeRO 3 it waits for its group, so that a slow
    rank shows as a slow group.
    """

    def __init__(self, model: RecycleGPT, mesh: Mesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device
        self._seconds, self._steps = 0.0, 0
        self._begun: Any = None
        self._events: list[tuple[Any, Any]] = []
        self._hosts: list[str] = []
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave)

    def data(self, seconds: float) -> None:
        """Adds the time that a step's data took; counts the step."""
        self._seconds += seconds
        self._steps += 1

    def reset(self) -> None:
        """Forgets what was timed so far."""
        self._seconds, self._steps = 0.0, 0
        self._events.clear()

    def gather(self) -> list[float]:
        """Seconds of its own work in a step, by rank, since the last call. Collective; synchronises the device."""
        own = self._seconds + sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        shared = torch.tensor([own / max(1, self._steps)], dtype=torch.float64, device=self._device)
        self.reset()
        if self._mesh.world_size == 1:
            return shared.tolist()
        parts = [torch.empty_like(shared) for _ in range(self._mesh.world_size)]
        dist.all_gather(parts, shared)
        return torch.cat(parts).tolist()

    def host_of(self, rank: int) -> str:
        """The host of a rank. Collective at the first call."""
        if not self._hosts:
            found: list[Any] = [None] * self._mesh.world_size
            if self._mesh.world_size > 1:
                dist.all_gather_object(found, socket.gethostname())
            else:
                found = [socket.gethostname()]
            self._hosts = found
        return self._hosts[rank]

    def _enter(self, *_: Any) -> None:
        if self._device.type == "cuda":
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()
        else:
            self._begun = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        if self._begun is None:
            return
        if self._device.type == "cuda":
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._events.append((self._begun, ended))
        else:
            self._seconds += time.perf_counter() - self._begun
        self._begun = None


def slowest(seconds: list[float], stages: int = 1) -> tuple[int, float, float]:
    """The rank that is furthest behind its peers, its seconds, and how many times the others' median that is (1 without peers).

    Peers are the ranks of one pipeline stage: stages have unequal work by nature, and are adjacent blocks of ranks.
    """
    size = len(seconds) // stages

    def ratio(rank: int) -> float:
        first = rank - rank % size
        others = [seconds[peer] for peer in range(first, first + size) if peer != rank]
        return seconds[rank] / max(median(others), 1e-9) if others else 1.0

    rank = max(range(len(seconds)), key=lambda one: (ratio(one), seconds[one]))
    return rank, seconds[rank], ratio(rank)
