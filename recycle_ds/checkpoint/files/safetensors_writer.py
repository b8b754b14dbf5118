"""Writing safetensors shards a tensor at a time, within one shard of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from recycle_ds.checkpoint.files.checksums import save_shard

Named = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]
"""Name, shape and type of a tensor, and what reads it."""


def split(tensors: Iterable[Named], shard_bytes: int) -> list[list[Named]]:
    """Shards of at most `shard_bytes`, but for a tensor that is larger by itself; in order."""
    shards: list[list[Named]] = []
    room = 0
    for named in tensors:
        size = torch.Size(named[1]).numel() * named[2].itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(named)
        room -= size
    return shards


def write_shards(
    folder: Path, shards: list[list[Named]], name: Callable[[int, int], str], step: Callable[[str], None]
) -> dict[str, list[str]]:
    """Writes every shard to disk; returns the names in each file. `step` is told each tensor's name as it is read."""
    written: dict[str, list[str]] = {}
    for number, shard in enumerate(shards, start=1):
        held: dict[str, Tensor] = {}
        for key, shape, dtype, read in shard:
            value = read().to(dtype).contiguous()
            assert tuple(value.shape) == tuple(shape), key
            held[key] = value
            step(key)
        path = folder / name(number, len(shards))
        save_shard(path, held)
        written[path.name] = list(held)
    return written
