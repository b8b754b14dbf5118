"""Reads boxes of tensors from .distcp files: only the chunks that overlap a box are read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.torch_archives import FilePart, archive_fault
from recycle_ds.checkpoint.megatron.fusing import Box
from recycle_ds.checkpoint.megatron.unpickling import Chunk, Stored
from recycle_ds.checkpoint.sources import shorten


class BlockFiles:
    """Reads a folder's files on demand. The last chunk is cached, because queries, keys and values share one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: tuple[Chunk, Tensor] | None = None
        self._lengths: dict[str, int] = {}

    def fault(self, stored: Stored) -> str | None:
        """Returns what is wrong with a tensor's chunks, or None: they must tile the tensor and be inside existing files."""
        if not _tiles(stored.shape, stored.chunks):
            return f"{stored.key}: its chunks do not tile {list(stored.shape)}"
        for chunk in stored.chunks:
            if chunk.file not in self._lengths:
                try:
                    self._lengths[chunk.file] = os.stat(self.folder / chunk.file).st_size
                except OSError:
                    return f"{chunk.file} is missing"
            if chunk.position + chunk.bytes > self._lengths[chunk.file]:
                return f"{chunk.file} has {self._lengths[chunk.file]} bytes, {stored.key} ends beyond them"
        return None

    def verify(self, tensors: Iterable[Stored], rank: int, world_size: int) -> None:
        """Compares the checksums of every world_size-th chunk from the rank-th, in disk order. Ranks share chunks, not files,
        because there may be only one file. Raises CheckpointError that names the damaged files.
        """
        chunks = {
            (chunk.file, chunk.position, chunk.bytes): stored.key for stored in tensors for chunk in stored.chunks
        }
        damaged = []
        for name, share in groupby(sorted(chunks)[rank::world_size], key=lambda chunk: chunk[0]):
            try:
                with (self.folder / name).open("rb") as file:
                    for chunk in share:
                        fault = archive_fault(FilePart(file, *chunk[1:]))
                        damaged += [] if fault is None else [f"{name} ({chunks[chunk]}: {fault})"]
            except OSError as error:
                damaged.append(f"{name} ({error.strerror})")
        if damaged:
            raise CheckpointError(f"{self.folder}: damaged: {shorten(damaged)}; copy them again")

    def read(self, stored: Stored, box: Box) -> Tensor:
        """Returns a new tensor with the lengths of the box, in the stored dtype. Raises CheckpointError."""
        value = torch.empty([length for _, length in box], dtype=stored.dtype)
        for chunk in stored.chunks:
            target: list[slice] = []
            source: list[slice] = []
            for (start, length), offset, size in zip(box, chunk.offsets, chunk.sizes, strict=True):
                first, last = max(start, offset), min(start + length, offset + size)
                target.append(slice(first - start, last - start))
                source.append(slice(first - offset, last - offset))
            if all(part.start < part.stop for part in target):
                value[tuple(target)] = self._load(stored, chunk)[tuple(source)]
        return value

    def _load(self, stored: Stored, chunk: Chunk) -> Tensor:
        if self._last is not None and self._last[0] is chunk:
            return self._last[1]
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                view = cast("IO[bytes]", FilePart(file, chunk.position, chunk.bytes))
                found = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive can raise any exception
            raise CheckpointError(f"{path}: {stored.key} cannot be read ({type(error).__name__})") from None
        if type(found) is not Tensor or found.layout != torch.strided:
            raise CheckpointError(f"{path}: {stored.key} is a {type(found).__name__}, not a plain tensor")
        if tuple(found.shape) != chunk.sizes or found.dtype != stored.dtype:
            raise CheckpointError(
                f"{path}: {stored.key} has a chunk of {list(found.shape)}, {found.dtype}, "
                f"but .metadata lists {list(chunk.sizes)}, {stored.dtype}"
            )
        self._last = (chunk, found)
        return found


def _tiles(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> bool:
    """Whether chunks cover every element once: the intervals along each axis are contiguous, recursively."""
    ranks = {len(shape)} | {len(chunk.offsets) for chunk in chunks} | {len(chunk.sizes) for chunk in chunks}
    if len(ranks) != 1 or math.prod(shape) == 0:
        return False
    return _tile_axis(shape, sorted(chunks, key=lambda chunk: (chunk.offsets, chunk.sizes)), 0)


def _tile_axis(shape: tuple[int, ...], chunks: Sequence[Chunk], axis: int) -> bool:
    if axis == len(shape):
        return len(chunks) == 1
    end = 0
    for (start, size), group in groupby(chunks, key=lambda chunk: (chunk.offsets[axis], chunk.sizes[axis])):
        if start != end or not _tile_axis(shape, list(group), axis + 1):
            return False
        end = start + size
    return end == shape[axis]
