"""Which elements each replica holds under ZeRO: pure functions, used by training, checks and the planner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def partition_size(elements: int, replicas: int) -> int:
    """ZeRO-3: elements per partition. The last ones are padded if `replicas` does not divide `elements`."""
    return -(-elements // replicas)


def partition_range(elements: int, replicas: int, rank: int) -> range:
    """ZeRO-3: elements of the flattened parameter on replica `rank`; empty if its partition is only padding."""
    size = partition_size(elements, replicas)
    return range(min(rank * size, elements), min((rank + 1) * size, elements))


def flat_partitions(sizes: Sequence[int], replicas: int) -> list[list[tuple[int, range]]]:
    """ZeRO-1 and 2: each replica's part of a parameter group, as (parameter index, elements of the flattened parameter).

    DeepSpeed concatenates a group's flattened parameters, pads the end to a multiple of 2 x replicas elements (NCCL needs
    4-byte alignment of bf16 numbers) and cuts the result into equal parts, which may split a parameter. Padding is not listed.
    """
    unit = 2 * replicas
    part = -(-sum(sizes) // unit) * unit // replicas
    held: list[list[tuple[int, range]]] = [[] for _ in range(replicas)]
    first = 0
    for index, size in enumerate(sizes):
        for replica in range(first // part, -(-(first + size) // part)):
            start, stop = max(replica * part, first), min((replica + 1) * part, first + size)
            held[replica].append((index, range(start - first, stop - first)))
        first += size
    return held


def local_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of this rank's tensor shard of a parameter, which ZeRO-3 may have partitioned over the replicas."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
