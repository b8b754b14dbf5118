"""How our tensors lie in Megatron's, and the way back.

    query_key_value  rows grouped by key/value head: its query heads, then its key, then its value
    gate_up          gate above up
    swapped          W [h; e] of ours is W' [e; h] of theirs: the halves of the columns change places
    vocabulary       rows below the vocabulary are padding

Everything holds for a tensor rank's part as for the whole: groups are whole heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recycle_ds.checkpoint.megatron.names import Entry
from recycle_ds.config import ModelConfig

Box = tuple[tuple[int, int], ...]
"""(start, length) along every axis."""


def fuse(entry: Entry, parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Megatron's tensor, from the canonical ones in the order of `entry.parts`."""
    if entry.kind == "query_key_value":
        rows = _rows(model)
        groups = [part.view(-1, count, *part.shape[1:]) for part, count in zip(parts, rows, strict=True)]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if entry.kind == "gate_up":
        return torch.cat(tuple(parts))
    (only,) = parts
    return _swap(only) if entry.kind == "swapped" else only


def take(
    entry: Entry, name: str, axis: int, start: int, length: int, model: ModelConfig, read: Callable[[Box], Tensor]
) -> Tensor:
    """Rows [start, start + length) along `axis` of the canonical tensor `name`, of which `read` gives Megatron's boxes."""
    box = [(0, size) for size in entry.shape]
    index = entry.parts.index(name)
    if entry.kind == "query_key_value":
        if axis != 0:
            box[axis] = (start, length)
            start, length = 0, entry.shape[0] // sum(_rows(model)) * _rows(model)[index]
        return _ungroup(index, start, length, model, lambda rows: read((rows, *box[1:])))
    if entry.kind == "swapped":
        if axis == 0:
            box[0] = (start, length)
            return _swap(read(tuple(box)))
        return _swap(read(tuple(box))).narrow(axis, start, length).contiguous()
    rows = entry.shape[0] // len(entry.parts)
    box[0] = (rows * index, rows)
    box[axis] = (box[axis][0] + start, length)
    return read(tuple(box))


def _rows(model: ModelConfig) -> tuple[int, int, int]:
    """Rows of queries, keys and values in the group of one key/value head."""
    channels = model.dim_per_head
    return model.heads // model.kv_heads * channels, channels, channels


def _ungroup(
    index: int, start: int, length: int, model: ModelConfig, read: Callable[[tuple[int, int]], Tensor]
) -> Tensor:
    """Rows of queries (index 0), keys (1) or values (2), out of the groups that hold them."""
    rows = _rows(model)
    count, group = rows[index], sum(rows)
    first, last = start // count, -(-(start + length) // count)
    held = read((first * group, (last - first) * group))
    held = held.view(last - first, group, *held.shape[1:]).narrow(1, sum(rows[:index]), count).flatten(0, 1)
    return held.narrow(0, start - first * count, length).contiguous()


def _swap(weight: Tensor) -> Tensor:
    """The halves of the columns exchanged: its own inverse."""
    left, right = weight.chunk(2, dim=1)
    return torch.cat((right, left), dim=1)
