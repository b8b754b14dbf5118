"""Copies to host memory that are made as late as on a GPU, on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recycle_ds.checkpoint.run.host_copies import HostCopies
from recycle_ds.checkpoint.run.shard_writer import ShardWriter
from recycle_ds.config import RunConfig
from tests.parallel.ranks import run_all


class LateCopies(HostCopies):
    """Live tensors are copied right before the next update, others after it."""

    waits = True
    """Whether an update waits for copies at all."""

    def __init__(self, device: torch.device, *, live: bool) -> None:
        super().__init__(device, live=live)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._lock, self._updates = threading.Lock(), 0
        self._released = threading.Event()

    def copy(self, value: Tensor) -> Tensor:
        """See `HostCopies`."""
        copied = torch.full_like(value, float("nan"), memory_format=torch.contiguous_format)
        with self._lock:
            self._pending.append((copied, value.detach()))
            self._updates = 0
            self._released.clear()
        return copied

    def completion(self) -> Callable[[], None]:
        """See `HostCopies`. It waits for an update, or for the run to need the checkpoint."""

        def wait() -> None:
            self._released.wait()
            self._make()

        return wait

    def before_update(self) -> None:
        """See `HostCopies`. It is called again when the update has been made."""
        self._updates += 1
        if self._live and self.waits:
            self._make()
        if self._updates > 1:
            self.release()

    def release(self) -> None:
        """Lets the writer go on."""
        self._released.set()

    def _make(self) -> None:
        with self._lock:
            for copied, value in self._pending:
                copied.copy_(value)
            self._pending = []


class TooLateCopies(LateCopies):
    """No update waits for copies."""

    waits = False


def run_with_copies(rank: int, world_size: int, kinds: Sequence[str], runs: list[RunConfig]) -> list[str]:
    """Like `run_all`. kinds: of the copies that each run makes: "now", "late" or "too late"."""
    from recycle_ds.checkpoint.run import saving

    classes = {"now": HostCopies, "late": LateCopies, "too late": TooLateCopies}
    copies, wait, endings = saving.HostCopies, ShardWriter.wait, list[str]()

    def released(writer: ShardWriter) -> str | None:
        own: Any = writer._copies
        if isinstance(own, LateCopies):
            own.release()
        return wait(writer)

    ShardWriter.wait = released  # type: ignore[method-assign]
    try:
        for kind, config in zip(kinds, runs, strict=True):
            saving.HostCopies = classes[kind]  # type: ignore[misc]
            endings += run_all(rank, world_size, [config])
    finally:
        saving.HostCopies, ShardWriter.wait = copies, wait  # type: ignore[misc, method-assign]
    return endings
