"""Copies of tensors in host memory, made while the device goes on.

On CUDA they go to page-locked memory, on a stream of their own. The host waits for them where they are written, and the device
only before it changes what is being copied. On a CPU a copy is complete when it is returned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LEAST_HELD = 2**28
"""Bytes whose copies may be under way at least: gathered tensors stay in device memory until they are copied."""


class HostCopies:
    """Copies from one device. Its methods are called by one thread, except those that `completion` returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held, self._most_held, self._under_way = 0, _LEAST_HELD, False
        self._preparing: threading.Thread | None = None

    def prepare(self, sizes: Sequence[int]) -> None:
        """Lets a thread lock pages for copies of these sizes in bytes: a second for each GiB, which the first copies would wait
        for. PyTorch keeps them for later copies."""
        if self._stream is None:
            return

        def lock() -> None:
            kept = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
            kept.clear()

        self._preparing = threading.Thread(target=lock, name="page-locked memory", daemon=True)
        self._preparing.start()

    def begin(self) -> None:
        """Called before the copies of a checkpoint."""
        if self._stream is None:
            return
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        free, _ = torch.cuda.mem_get_info(self._device)
        self._most_held = max(_LEAST_HELD, free // 2)

    def copy(self, value: Tensor) -> Tensor:
        """A copy in host memory, of the value that the tensor has now. Read it after `completion`."""
        value = value.detach()
        if self._stream is None or value.device.type != "cuda":
            return value.to("cpu", copy=True).contiguous()
        size = value.numel() * value.element_size()
        if self._held + size > self._most_held:
            self._stream.synchronize()
            self._held = 0
        copied = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copied.copy_(value, non_blocking=True)
        value.record_stream(self._stream)  # its memory is not used again before the copy is complete
        self._held, self._under_way = self._held + size, True
        return copied

    def completion(self) -> Callable[[], None]:
        """A function, for any thread, that returns once all copies up to now are complete."""
        if self._stream is None:
            return _complete
        event = torch.cuda.Event()
        event.record(self._stream)
        return event.synchronize

    def before_changes(self) -> None:
        """Lets all that the device computes from now on wait for the copies that are under way; the host does not wait."""
        if self._under_way:
            assert self._stream is not None
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._held, self._under_way = 0, False


def _complete() -> None:
    """There is nothing to wait for."""
