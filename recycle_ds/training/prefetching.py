"""Reads the next step's batches while the device computes, so that it does not wait for the host."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from recycle_ds.data.loader import Batch, BatchLoader


class PrefetchingLoader(BatchLoader):
    """A loader whose thread reads one step ahead, into page-locked memory if `pin` is set.

    It gives what `loader` gives: a step that was not expected, as after a rollback, is read when it is asked for, and an
    error of the thread is raised by the step that it belongs to.
    """

    def __init__(self, loader: BatchLoader, *, pin: bool) -> None:
        self.dataset, self.global_batch_size = loader.dataset, loader.global_batch_size
        self.micro_batch_size, self.micro_batches = loader.micro_batch_size, loader.micro_batches
        self._loader, self._pin = loader, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def step(self, first_sample: int) -> list[Batch]:
        """See `BatchLoader.step`. Raises DataError as it does."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == first_sample:
            batches = ahead[1].result()
        else:
            batches = self._thread.submit(self._read, first_sample).result()
        following = first_sample + self.global_batch_size
        self._ahead = following, self._thread.submit(self._read, following)
        return batches

    def _read(self, first_sample: int) -> list[Batch]:
        batches = self._loader.step(first_sample)
        return [batch.pinned() for batch in batches] if self._pin else batches


def prefetch(loader: BatchLoader, device: torch.device) -> BatchLoader:
    """The loader itself on a CPU, where a thread would take time from the step; on a GPU one that reads ahead."""
    return PrefetchingLoader(loader, pin=True) if device.type == "cuda" else loader
