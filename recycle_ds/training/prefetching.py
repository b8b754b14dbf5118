"""Reads the next step's batches while the device computes, so that it does not wait for the host."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from recycle_ds.data.loader import Batch, BatchLoader


class PrefetchingLoader(BatchLoader):
    """A loader whose thread reads one step ahead, into page-locked memory if `pin` is set.

    It gives what `loader` gives: a step that was not expected, as after a rollback, is read when it is asked for, and an
    error of the thread is raised by the step that it belongs to.
    """

    def __init__(
        self, loader: BatchLoader, *, pin: bool, end: int | None = None, device: torch.device | None = None
    ) -> None:
        """end: the sample before which reading ahead stops; None for no end. device: the CUDA device for which it pins."""
        self.dataset, self.global_batch_size = loader.dataset, loader.global_batch_size
        self.micro_batch_size, self.micro_batches = loader.micro_batch_size, loader.micro_batches
        self._loader, self._pin, self._end = loader, pin, end
        # a new thread would pin by way of device 0, and occupy memory there
        start = (torch.cuda.set_device, (device,)) if device is not None else (None, ())
        self._thread = ThreadPoolExecutor(1, "batches", *start)
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def step(self, first_sample: int) -> list[Batch]:
        """See `BatchLoader.step`. Raises DataError as it does."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == first_sample:
            batches = ahead[1].result()
        else:
            batches = self._thread.submit(self._read, first_sample).result()
        following = first_sample + self.global_batch_size
        if self._end is None or following < self._end:
            self._ahead = following, self._thread.submit(self._read, following)
        return batches

    def close(self) -> None:
        """Ends the thread. Does not wait for what it is reading, which may be on a file server that no longer answers; the
        interpreter's own end does, but for `exit_process`, by which the command leaves."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, first_sample: int) -> list[Batch]:
        batches = self._loader.step(first_sample)
        return [batch.pinned() for batch in batches] if self._pin else batches


@contextmanager
def prefetch(loader: BatchLoader, device: torch.device, end: int) -> Iterator[BatchLoader]:
    """The loader itself on a CPU, where a thread would take time from the step; on a GPU one that reads ahead, up to sample
    `end`, until the block is left."""
    if device.type != "cuda":
        yield loader
        return
    ahead = PrefetchingLoader(loader, pin=True, end=end, device=device)
    try:
        yield ahead
    finally:
        ahead.close()
