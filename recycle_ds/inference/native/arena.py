"""Memory in huge pages where the system has them: for packed weights and for the KV cache."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

from recycle_ds.inference.errors import DecodingError

_HUGE_PAGE = 2**21
_CHUNK = 32 * 2**20
_LINE = 64
# Bytes of a tensor from which on it is kept in huge pages: for a smaller one, the rest of the last page would be much.
_LEAST_SIZE = 4 * _HUGE_PAGE


class Arena:
    """Memory that is taken in pieces and never given back before all of its tensors are gone.

    Weights are read from beginning to end for every token. With pages of 4 KiB the processor interrupts this for every 64
    cache lines.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor in this memory."""
        size = tensor.numel() * tensor.element_size()
        if self._used + size > len(self._chunk):
            self._chunk, self._used = _allocated(max(size, _CHUNK)), 0
        piece = self._chunk[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // _LINE) * _LINE
        return piece.copy_(tensor)


def empty_in_huge_pages(*sizes: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for what is read in pieces that lie apart: the processor looks each piece's page up. In pages of
    the usual size below 8 MiB. Memory is used once it is written, a whole page at a time. Raises DecodingError if there is too
    little."""
    size = math.prod(sizes) * dtype.itemsize
    if size < _LEAST_SIZE:
        return torch.empty(sizes, dtype=dtype)
    return _allocated(size)[:size].view(dtype).view(sizes)


def _allocated(size: int) -> Tensor:
    """At least `size` bytes, aligned to a huge page. Memory is used once it is written."""
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    try:
        memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        reason = f"{error.strerror}; lower --kv-memory-gib, or take a smaller model"
        raise DecodingError(f"{size / 2**30:.1f} GiB of memory for weights or the KV cache: {reason}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    first = -everything.data_ptr() % _HUGE_PAGE
    return everything[first : first + size]
