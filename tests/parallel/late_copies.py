"""Copies to host memory that are made as late as on a GPU, on the CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recycle_ds.checkpoint.run.host_copies import HostCopies
from recycle_ds.config import RunConfig
from tests.parallel.ranks import run_all

_LATE = 0.4
"""Seconds after which copies are made that nothing has asked for: several steps of the tests' models."""


class LateCopies(HostCopies):
    """Copies are made when the device is about to change something, or `_LATE` seconds after they were asked for."""

    hurries = True
    """Whether they are made before changes at all."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.Lock()

    def copy(self, value: Tensor) -> Tensor:
        """See `HostCopies`."""
        copied = torch.full_like(value, float("nan"), memory_format=torch.contiguous_format)
        with self._lock:
            self._pending.append((copied, value.detach()))
        return copied

    def completion(self) -> Callable[[], None]:
        """See `HostCopies`."""

        def wait() -> None:
            time.sleep(_LATE)
            self._make()

        return wait

    def before_changes(self) -> None:
        """See `HostCopies`."""
        if self.hurries:
            self._make()

    def _make(self) -> None:
        with self._lock:
            for copied, value in self._pending:
                copied.copy_(value)
            self._pending = []


class TooLateCopies(LateCopies):
    """Copies that nobody waits for before the update."""

    hurries = False


def run_with_copies(rank: int, world_size: int, kinds: Sequence[str], runs: list[RunConfig]) -> list[str]:
    """Like `run_all`. kinds: of the copies that each run makes: "now", "late" or "too late"."""
    from recycle_ds.checkpoint.run import saving

    classes = {"now": HostCopies, "late": LateCopies, "too late": TooLateCopies}
    original, endings = saving.HostCopies, list[str]()
    try:
        for kind, config in zip(kinds, runs, strict=True):
            saving.HostCopies = classes[kind]  # type: ignore[misc]
            endings += run_all(rank, world_size, [config])
    finally:
        saving.HostCopies = original  # type: ignore[misc]
    return endings
