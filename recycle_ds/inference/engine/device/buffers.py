"""Static buffers of a step: what the host tells the device in one copy, and what the device tells the host in one.

All numbers are 64 bits wide, integers or floats, so that one allocation holds them all. Shapes: S sequences, R rows, J nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Field = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype: int64 or float64."""


class Inbox:
    """Fields with fixed places in one buffer on the host (pinned for a GPU) and one on the device.

    Each copy transfers the beginning of the buffer up to the used rows of the last field, which is the largest one."""

    def __init__(self, fields: Mapping[str, Field], device: torch.device) -> None:
        sizes = [math.prod(shape) for shape, _ in fields.values()]
        self._last = sum(sizes[:-1])
        self._row = math.prod(list(fields.values())[-1][0][1:])
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=on_gpu)
        self._device = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None
        self.host: dict[str, NDArray[np.int64] | NDArray[np.float64]] = {}
        """Fields to be written, between `wait` and `send`."""
        self.fields: dict[str, Tensor] = {}
        """The same fields on the device."""
        self._starts: dict[str, int] = {}
        at = 0
        for (name, (shape, dtype)), size in zip(fields.items(), sizes, strict=True):
            self.host[name] = self._host[at : at + size].view(dtype).view(shape).numpy()
            self.fields[name] = self._device[at : at + size].view(dtype).view(shape)
            self._starts[name] = at
            at += size

    def together(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Adjacent fields of whole numbers and the same shape on the host, as one array [fields, ...]."""
        first, start = self.host[names[0]], self._starts[names[0]]
        for number, name in enumerate(names):
            assert self.host[name].shape == first.shape and self.host[name].dtype.kind == "i", name
            assert self._starts[name] == start + number * first.size, name
        return self._host[start : start + len(names) * first.size].view(len(names), *first.shape).numpy()

    def wait(self) -> None:
        """Waits until the device has read what was sent last: then the host may write again."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, rows: int) -> None:
        """Starts the copy to the device. rows: of the last field."""
        end = self._last + rows * self._row
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))


class Outbox:
    """Brings tensors to the host in one copy, for which the host waits when it needs them."""

    def __init__(self, room: int, device: torch.device) -> None:
        """room: numbers at most."""
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(room, dtype=torch.int64, pin_memory=on_gpu)
        self._numbers = self._host.numpy()
        self._device, self._copied = device, torch.cuda.Event() if on_gpu else None
        self._forms: list[tuple[torch.Size, torch.dtype]] = []

    def send(self, parts: Sequence[Tensor]) -> None:
        """Starts the copy of tensors of int64 or float64. What was sent before must have been received, or is lost."""
        flat = torch.cat([part.reshape(-1).view(torch.int64) for part in parts])
        self._host[: len(flat)].copy_(flat, non_blocking=True)
        self._forms = [(part.shape, part.dtype) for part in parts]
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def receive(self) -> list[NDArray[np.int64] | NDArray[np.float64]]:
        """Waits for what was sent, each tensor with its shape. It is valid until the next `send`."""
        if self._copied is not None:
            self._copied.synchronize()
        found, at = list[NDArray[np.int64] | NDArray[np.float64]](), 0
        for shape, dtype in self._forms:
            size = shape.numel()
            piece = self._numbers[at : at + size]
            found.append((piece if dtype == torch.int64 else piece.view(np.float64)).reshape(shape))
            at += size
        return found
