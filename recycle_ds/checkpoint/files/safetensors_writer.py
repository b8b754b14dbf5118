"""Writing safetensors shards, tensor by tensor, with at most one shard in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from recycle_ds.checkpoint.files.rounding import rounded
from recycle_ds.config.atomic_files import fsync

Named = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]
"""Name, shape and dtype of a tensor, and a function that reads it."""


def split(tensors: Iterable[Named], shard_bytes: int) -> list[list[Named]]:
    """Groups tensors, in order, into shards of at most `shard_bytes`; a larger tensor gets a shard of its own."""
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
    """Writes every shard to disk; returns the tensor names in each file. `step` is called with the name of each tensor read.
    Raises CheckpointError for a number beyond the range of its tensor's dtype."""
    written: dict[str, list[str]] = {}
    for number, shard in enumerate(shards, start=1):
        values: dict[str, Tensor] = {}
        for key, shape, dtype, read in shard:
            value = rounded(key, read(), dtype).contiguous()
            assert tuple(value.shape) == tuple(shape), key
            values[key] = value
            step(key)
        path = folder / name(number, len(shards))
        save_shard(path, values)
        written[path.name] = list(values)
    return written


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file and forces it to disk. Its mode follows the umask, which safetensors itself ignores."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(mode)
    fsync(path)
