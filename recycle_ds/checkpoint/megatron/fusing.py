"""How our tensors are laid out in Megatron's, and the inverse.

    query_key_value  rows grouped by key/value head: its query heads, then its key, then its value
    gate_up          gate above up
    swapped          our W [h; e] is Megatron's W' [e; h]: the two halves of the columns are exchanged
    vocabulary       rows beyond the vocabulary size are padding

This applies to the full tensor and to a tensor rank's shard: every group has complete heads.
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
    """Returns Megatron's tensor, built from the canonical ones in the order of `entry.parts`."""
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
    """Returns rows [start, start + length) along `axis` of canonical tensor `name`. read: reads a box of Megatron's tensor."""
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
    """Returns the number of query, key and value rows in the group of one key/value head."""
    channels = model.dim_per_head
    return model.heads // model.kv_heads * channels, channels, channels


def _ungroup(
    index: int, start: int, length: int, model: ModelConfig, read: Callable[[tuple[int, int]], Tensor]
) -> Tensor:
    """Returns rows of queries (index 0), keys (1) or values (2), from the groups that contain them."""
    rows = _rows(model)
    count, group = rows[index], sum(rows)
    first, last = start // count, -(-(start + length) // count)
    values = read((first * group, (last - first) * group))
    values = values.view(last - first, group, *values.shape[1:]).narrow(1, sum(rows[:index]), count).flatten(0, 1)
    return values.narrow(0, start - first * count, length).contiguous()


def _swap(weight: Tensor) -> Tensor:
    """Exchanges the two halves of the columns. This is its own inverse."""
    left, right = weight.chunk(2, dim=1)
    return torch.cat((right, left), dim=1)
