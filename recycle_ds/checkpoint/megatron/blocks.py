"""Boxes of tensors out of .distcp files: only the chunks that overlap them are read."""

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
    """Reads a folder's files as they are asked for. The chunk read last is kept: queries, keys and values share theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: tuple[Chunk, Tensor] | None = None
        self._lengths: dict[str, int] = {}

    def fault(self, stored: Stored) -> str | None:
        """What is wrong with where a tensor lies, or None: its chunks must tile it and lie in files that are there."""
        if not _tiles(stored.shape, stored.chunks):
            return f"{stored.key}: its parts do not make up {list(stored.shape)}"
        for chunk in stored.chunks:
            if chunk.file not in self._lengths:
                try:
                    self._lengths[chunk.file] = os.stat(self.folder / chunk.file).st_size
                except OSError:
                    return f"{chunk.file} is missing"
            if chunk.position + chunk.bytes > self._lengths[chunk.file]:
                return f"{chunk.file} has {self._lengths[chunk.file]} bytes, {stored.key} lies beyond them"
        return None

    def verify(self, tensors: Iterable[Stored], rank: int, world_size: int) -> None:
        """Compares the checksums of every world_size-th chunk from the rank-th, in their order on disk: a share of chunks and
        not of files, of which there may be one. Raises CheckpointError that names the damaged ones.
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
            raise CheckpointError(f"{self.folder}: damaged: {shorten(damaged)}; copy it anew")

    def read(self, stored: Stored, box: Box) -> Tensor:
        """A new tensor of the box's lengths, in the stored type. Raises CheckpointError."""
        value = torch.empty([length for _, length in box], dtype=stored.dtype)
        for chunk in stored.chunks:
            into: list[slice] = []
            out_of: list[slice] = []
            for (start, length), offset, size in zip(box, chunk.offsets, chunk.sizes, strict=True):
                first, last = max(start, offset), min(start + length, offset + size)
                into.append(slice(first - start, last - start))
                out_of.append(slice(first - offset, last - offset))
            if all(part.start < part.stop for part in into):
                value[tuple(into)] = self._load(stored, chunk)[tuple(out_of)]
        return value

    def _load(self, stored: Stored, chunk: Chunk) -> Tensor:
        if self._last is not None and self._last[0] is chunk:
            return self._last[1]
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                view = cast("IO[bytes]", FilePart(file, chunk.position, chunk.bytes))
                found = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive raises whatever its bytes happen to ask for
            raise CheckpointError(f"{path}: {stored.key} cannot be read ({type(error).__name__})") from None
        if type(found) is not Tensor or found.layout != torch.strided:
            raise CheckpointError(f"{path}: {stored.key} is a {type(found).__name__}, not a plain tensor")
        if tuple(found.shape) != chunk.sizes or found.dtype != stored.dtype:
            raise CheckpointError(
                f"{path}: {stored.key} has a part of {list(found.shape)}, {found.dtype}, "
                f"its list says {list(chunk.sizes)}, {stored.dtype}"
            )
        self._last = (chunk, found)
        return found


def _tiles(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> bool:
    """Whether chunks make up a tensor, each element once: intervals along an axis that follow each other, and so on within."""
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
