"""Locates the elements of each parameter in the flat fp32 partitions that ZeRO saves. Pure arithmetic over sizes.

ZeRO 1, 2: the parameters of a group are concatenated (some padded to an alignment) and the result is split over the data ranks:
    [ a a a a b | b b c c c | c c . . . ]
ZeRO 3: each parameter is split over the data ranks, and each rank concatenates its parts:
    [ a a b b c c ]  [ a a b b c c ]  [ a . b b c . ]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from recycle_ds.checkpoint.deepspeed_native.loading import Keys, Span
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.parallel.partitions import partition_range, partition_size

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Flat:
    """A flat tensor in a file: a rank's partition of a group, or one of ZeRO 3's sub-groups."""

    file: str
    keys: Keys
    elements: int


def cut_groups(
    groups: Sequence[Shapes], paddings: Sequence[Sequence[int]] | None, partitions: Sequence[Sequence[Flat]], where: str
) -> dict[str, tuple[Span, ...]]:
    """Locates parameters of ZeRO 1 and 2. groups: shapes by name, in the order of flattening; paddings: padding elements after
    each parameter; partitions: [group][data rank].

    Raises CheckpointError if the sizes of the partitions do not match the shapes.
    """
    found: dict[str, tuple[Span, ...]] = {}
    for index, (shapes, ranks) in enumerate(zip(groups, partitions, strict=True)):
        after = paddings[index] if paddings is not None else [0] * len(shapes)
        if len(after) != len(shapes):
            raise CheckpointError(f"{where}: group {index}: {len(shapes)} parameters, but {len(after)} paddings")
        starts, end = [], 0
        for shape, padding in zip(shapes.values(), after, strict=True):
            starts.append(end)
            end += torch.Size(shape).numel() + padding
        _check_group(index, end, [rank.elements for rank in ranks], where)
        for (name, shape), start in zip(shapes.items(), starts, strict=True):
            found[name] = _between(ranks, start, torch.Size(shape).numel())
    return found


def cut_each(shapes: Shapes, partitions: Sequence[Sequence[Flat]], where: str) -> dict[str, tuple[Span, ...]]:
    """Locates parameters of ZeRO 3. shapes: by name, over all groups in order; partitions: [data rank][sub-group].

    Raises CheckpointError if the sizes of the partitions differ between ranks, or do not match the shapes.
    """
    replicas = len(partitions)
    sizes = [[flat.elements for flat in ranks] for ranks in partitions]
    needed = sum(partition_size(torch.Size(shape).numel(), replicas) for shape in shapes.values())
    for rank, own in enumerate(sizes):
        if own != sizes[0] or sum(own) != needed:
            raise CheckpointError(
                f"{where}: data rank {rank} of {replicas} holds {sum(own)} elements in {len(own)} sub-groups, rank 0 "
                f"{sum(sizes[0])} in {len(sizes[0])}; the parameters need {needed} per rank (those offloaded to NVMe are not "
                "in these files)"
            )
    found: dict[str, tuple[Span, ...]] = {}
    offset = 0
    for name, shape in shapes.items():
        elements = torch.Size(shape).numel()
        spans: list[Span] = []
        for rank in range(replicas):
            spans += _between(partitions[rank], offset, len(partition_range(elements, replicas, rank)))
        found[name] = tuple(spans)
        offset += partition_size(elements, replicas)
    return found


def _between(flats: Sequence[Flat], start: int, length: int) -> tuple[Span, ...]:
    """Returns the spans of `length` elements from `start` of the concatenated flat tensors."""
    spans = []
    for flat in flats:
        first, last = max(start, 0), min(start + length, flat.elements)
        if first < last:
            spans.append(Span(flat.file, flat.keys, first, last - first))
        start -= flat.elements
    return tuple(spans)


def _check_group(index: int, needed: int, sizes: Sequence[int], where: str) -> None:
    """Raises CheckpointError for partitions of unequal size. The end may be saved without its padding to 2 x ranks elements."""
    held = sum(sizes)
    uneven = any(size != sizes[0] and any(sizes[rank + 1 :]) for rank, size in enumerate(sizes))
    if uneven or not 0 <= held - needed < 2 * len(sizes):
        raise CheckpointError(
            f"{where}: group {index}: {len(sizes)} data ranks hold {held} elements ({', '.join(map(str, sizes[:8]))}), but "
            f"the parameters need {needed}"
        )
