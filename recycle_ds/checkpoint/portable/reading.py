"""Reads slices of canonical tensors from a portable checkpoint; only the bytes that are needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import verify_all
from recycle_ds.checkpoint.files.safetensors_reader import ShardFiles
from recycle_ds.checkpoint.portable.manifest import Manifest, Slice, TensorEntry, slice_shape
from recycle_ds.checkpoint.sequence_length import read_window
from recycle_ds.config import ConfigError, ModelConfig, RecycleConfig, build_section


class PortableSource:
    """See `Source`. Shards are memory-mapped and stay open."""

    kind = "portable"
    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Raises CheckpointError for an invalid configuration."""
        self.folder, self.manifest, self.step = folder, manifest, manifest.step
        try:
            self.model = build_section(ModelConfig, manifest.config.get("model") or {})
            self.recycle = build_section(RecycleConfig, manifest.config.get("recycle") or {})
        except ConfigError as error:
            raise CheckpointError(f"{folder}: invalid configuration: {error}") from None
        tokenizer = folder / "tokenizer.json"
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(entry.shape) for name, entry in manifest.tensors.items()
        }
        self._files = ShardFiles(folder)
        self.seq_length = read_window(folder, manifest.config, self.model)

    @property
    def weights_only(self) -> bool:
        """Whether it was written by a conversion: it has no training state to resume from."""
        return "training" not in self.manifest.config

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """See `Source`."""
        files = self.manifest.files
        verify_all(self.folder, {name: files[name] for name in sorted(files)[rank::world_size]})

    def has(self, name: str, kind: str) -> bool:
        """See `Source`."""
        return any(piece.kind == kind for piece in self._entry(name).slices)

    def dtype(self, name: str) -> torch.dtype:
        """See `Source`."""
        piece = next(piece for piece in self._entry(name).slices if piece.kind == "weight")
        return self._files.dtype(piece.file, piece.key)

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """See `Source`. Raises CheckpointError for a missing tensor, and for one whose shape is not that in the manifest."""
        entry = self._entry(name)
        slices = [piece for piece in entry.slices if piece.kind == kind]
        if not slices:
            raise CheckpointError(f"{self.folder}: no {kind} of {name}")
        if length is None:
            length = entry.shape[axis] - start
        if slices[0].axis != axis:  # saved in slices along another axis: read all of it, then slice
            full = self._gather(entry, slices, slices[0].axis, 0, entry.shape[slices[0].axis])
            return full.narrow(axis, start, length).contiguous()
        return self._gather(entry, slices, axis, start, start + length)

    def probe(self, names: Iterable[str]) -> None:
        """Raises CheckpointError unless every stored slice of these tensors exists with the shape in the manifest.

        Called before a weight changes: a manifest can be valid in itself and not match the files next to it.
        """
        for name in names:
            entry = self._entry(name)
            for piece in entry.slices:
                self._check(entry, piece)

    def _check(self, entry: TensorEntry, piece: Slice) -> None:
        stored, expected = self._files.shape(piece.file, piece.key), slice_shape(entry, piece)
        if stored != expected:
            raise CheckpointError(
                f"{self.folder / piece.file}: {piece.key} has shape {stored}, but {expected} in the manifest"
            )
        self._files.dtype(piece.file, piece.key)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        return entry

    def _gather(self, entry: TensorEntry, slices: list[Slice], axis: int, start: int, end: int) -> Tensor:
        parts = []
        for piece in sorted(slices, key=lambda piece: piece.start):
            first, last = max(start, piece.start), min(end, piece.start + piece.length)
            if first < last:
                self._check(entry, piece)
                parts.append(self._files.read(piece.file, piece.key, axis, first - piece.start, last - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
