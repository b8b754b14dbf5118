"""Finds ranks that are slower than the others: each times its own work, without the time it waits for other ranks."""

from __future__ import annotations

import socket
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recycle_ds.parallel.device import synchronise
from recycle_ds.parallel.mesh import Mesh


class WorkTimer:
    """Times a rank's reading of data and its forward passes.

    A full step takes the same time on all ranks, since they wait for one another. In data parallelism at ZeRO 0 to 2 a forward
    pass waits for no other rank; under tensor, sequence and Ulysses parallelism and ZeRO 3 it waits for its group, so a slow
    rank shows as a slow group.
    """

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        """module: its forward pass is timed. It must not be one that torch.compile compiles, as DeepSpeed's engine does its
        own module: CUDA events that are recorded inside a compiled graph are lost."""
        self._mesh = mesh
        self._seconds, self._steps = 0.0, 0
        self._start: Any = None
        self._events: list[tuple[Any, Any]] = []
        self._hosts: list[str] = []
        module.register_forward_pre_hook(self._before_forward)
        module.register_forward_hook(self._after_forward)

    def data(self, seconds: float) -> None:
        """Adds the seconds that reading a step's data took, and counts the step."""
        self._seconds += seconds
        self._steps += 1

    def reset(self) -> None:
        """Discards all times so far."""
        self._seconds, self._steps = 0.0, 0
        self._events.clear()

    def gather(self) -> list[float]:
        """Mean seconds of a rank's own work per step since the last call, by rank. Collective; synchronises the device."""
        if self._events:
            synchronise(self._mesh.device)
        own = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        shared = torch.tensor([own / max(1, self._steps)], dtype=torch.float64, device=self._mesh.device)
        self.reset()
        if self._mesh.world_size == 1:
            return shared.tolist()
        parts = [torch.empty_like(shared) for _ in range(self._mesh.world_size)]
        dist.all_gather(parts, shared)
        return torch.cat(parts).tolist()

    def host_of(self, rank: int) -> str:
        """The host name of a rank. The first call is collective."""
        if not self._hosts:
            found: list[Any] = [None] * self._mesh.world_size
            if self._mesh.world_size > 1:
                dist.all_gather_object(found, socket.gethostname())
            else:
                found = [socket.gethostname()]
            self._hosts = found
        return self._hosts[rank]

    def _before_forward(self, *_: Any) -> None:
        if self._mesh.device.type == "cuda":
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()

    def _after_forward(self, *_: Any) -> None:
        if self._start is None:
            return
        if self._mesh.device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._start, end))
        else:
            self._seconds += time.perf_counter() - self._start
        self._start = None


def slowest(seconds: list[float], stages: int = 1) -> tuple[int, float, float]:
    """The rank that is slowest relative to its peers, its seconds, and their ratio to its peers' median (1 without peers).

    Peers are the ranks of one pipeline stage, a block of adjacent ranks; different stages have unequal work by design.
    """
    size = len(seconds) // stages

    def ratio(rank: int) -> float:
        first = rank - rank % size
        peers = [seconds[peer] for peer in range(first, first + size) if peer != rank]
        return seconds[rank] / max(median(peers), 1e-9) if peers else 1.0

    rank = max(range(len(seconds)), key=lambda one: (ratio(one), seconds[one]))
    return rank, seconds[rank], ratio(rank)
