"""Reading slices of canonical tensors out of a checkpoint's shards, only the bytes that are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.manifest import Manifest, TensorEntry, slice_shape
from recycle_ds.model.sharding import Piece


class TensorReader:
    """Reads any part of any tensor of one checkpoint. Shards are memory-mapped and stay open."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: dict[str, Any] = {}

    def read(self, name: str, kind: str, axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """Rows [start, start + length) along `axis`. Raises CheckpointError for what is absent or of another shape."""
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        slices = [piece for piece in entry.slices if piece.kind == kind]
        if not slices:
            raise CheckpointError(f"{self.folder}: no {kind} of {name}")
        if length is None:
            length = entry.shape[axis] - start
        end = start + length
        if slices[0].axis != axis:  # split another way at save: read all, then cut
            whole = self._gather(entry, slices, slices[0].axis, 0, entry.shape[slices[0].axis])
            return whole.narrow(axis, start, length).contiguous()
        return self._gather(entry, slices, axis, start, end)

    def local(self, row: tuple[Piece, ...], shape: tuple[int, ...], kind: str) -> Tensor:
        """A local parameter assembled from its pieces; vocabulary padding is zero."""
        value = torch.zeros(shape, dtype=torch.float32)
        for piece in row:
            part = self.read(piece.name, kind, piece.axis, piece.start, piece.length)
            value.narrow(piece.axis, piece.local_start, piece.length).copy_(part)
        return value

    def _gather(self, entry: TensorEntry, slices: list[Any], axis: int, start: int, end: int) -> Tensor:
        parts = []
        for piece in sorted(slices, key=lambda piece: piece.start):
            first, last = max(start, piece.start), min(end, piece.start + piece.length)
            if first < last:
                index = [slice(None)] * len(entry.shape)
                index[axis] = slice(first - piece.start, last - piece.start)
                parts.append(self._slice(piece.file, piece.key, slice_shape(entry, piece))[tuple(index)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def _slice(self, file: str, key: str, shape: tuple[int, ...]) -> Any:
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.folder / file), framework="pt")
            part = self._open[file].get_slice(key)
            stored = tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {key}: {error}") from None
        if stored != shape:
            raise CheckpointError(f"{self.folder / file}: {key} has shape {stored}, the manifest says {shape}")
        return part
