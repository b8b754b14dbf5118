"""Copies of tensors in host memory for a checkpoint.

On CUDA the copies are made on a stream of their own into page-locked memory, while the training loop and the device continue.
The writing thread waits for them. The device waits for them only before it updates tensors that are being copied. On a CPU
a copy is complete when it is returned.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

SLAB_BYTES = 2**28
"""Page-locked memory is allocated in pieces of this size: PyTorch rounds other sizes up to a power of two."""
_ALIGNMENT = 64
# Bytes of gathered tensors that may wait in device memory for their copies, and bytes between two of the events that say so.
_MOST_WAITING, _BETWEEN_EVENTS = 2**30, 2**26


class HostCopies:
    """Copies from one device. One thread calls the methods; any thread may call what `completion` returns.

    live: whether the tensors are those that training updates, and not copies of them.
    """

    def __init__(self, device: torch.device, *, live: bool) -> None:
        self._device, self._live = device, live
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """Of the copies; None on a CPU, or after the operating system has refused page-locked memory."""
        self._slab: Tensor | None = None
        self._used = 0
        self._waiting: deque[tuple[torch.cuda.Event, int]] = deque()
        self._since_event, self._changes_wait = 0, False
        self._preparing: threading.Thread | None = None
        self._stop_preparing = threading.Event()

    def prepare(self, size: int) -> None:
        """Starts a thread that page-locks memory for `size` bytes, which takes about a second for each GiB. PyTorch keeps the
        memory for the copies of all checkpoints."""
        if self.stream is None or size == 0:
            return

        def lock() -> None:
            kept: list[Tensor] = []
            while len(kept) * SLAB_BYTES < size and not self._stop_preparing.is_set():
                slab = _page_locked(SLAB_BYTES, self._device)
                if slab is None:
                    return  # the first copy finds the same, and says so
                kept.append(slab)

        self._preparing = threading.Thread(target=lock, name="page-locked memory", daemon=True)
        self._preparing.start()

    def end_preparation(self) -> None:
        """Called before the copies of a checkpoint. Waits for one slab at most: the copies allocate the others."""
        if self._preparing is not None:
            self._stop_preparing.set()
            self._preparing.join()
            self._preparing = None

    def copy(self, value: Tensor) -> Tensor:
        """A copy in host memory of the value that the tensor has now. Read it after `completion`."""
        value = value.detach()
        size = value.numel() * value.element_size()
        target = self._room(size) if value.device.type == "cuda" and 0 < size <= SLAB_BYTES else None
        if target is None or self.stream is None:
            return value.to("cpu", copy=True).contiguous()
        copied = target.view(value.dtype).view(value.shape)
        self._limit_waiting()
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            copied.copy_(value, non_blocking=True)
            self._since_event += size
            if not self._live and self._since_event >= _BETWEEN_EVENTS:
                self._waiting.append((self._event(), self._since_event))
                self._since_event = 0
        value.record_stream(self.stream)  # its memory is not used again before the copy is complete
        self._changes_wait = self._live
        return copied

    def completion(self) -> Callable[[], None]:
        """A function that returns once all copies up to now are complete."""
        if self.stream is None:
            return _complete
        with torch.cuda.stream(self.stream):
            event = self._event()

        def wait() -> None:
            with torch.cuda.device(self._device):  # a new thread would use the first device
                event.synchronize()

        return wait

    def before_update(self) -> None:
        """Called before training updates its tensors: lets the device wait for the copies of them. The host does not wait."""
        if self._changes_wait and self.stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self.stream)
        self._changes_wait = False

    def _room(self, size: int) -> Tensor | None:
        """Some page-locked bytes; None if there are none."""
        first = math.ceil(self._used / _ALIGNMENT) * _ALIGNMENT
        if self._slab is None or first + size > SLAB_BYTES:
            self._slab, first = _page_locked(SLAB_BYTES, self._device), 0
            if self._slab is None:
                if self.stream is not None:
                    self.stream.synchronize()
                    self.stream = None
                    print(
                        f"warning: no page-locked memory ({SLAB_BYTES:,} bytes): training waits for copies", flush=True
                    )
                return None
        self._used = first + size
        return self._slab[first : self._used]

    def _limit_waiting(self) -> None:
        """Waits for the oldest copies while too many gathered tensors are kept in device memory for theirs."""
        while not self._live and sum(size for _, size in self._waiting) > _MOST_WAITING:
            event, _ = self._waiting.popleft()
            event.synchronize()

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event


def _page_locked(size: int, device: torch.device) -> Tensor | None:
    """Page-locked memory; None if the operating system or the driver refuses it."""
    try:
        with torch.cuda.device(device):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None


def _complete() -> None:
    """Copies on a CPU are complete when they are made."""
