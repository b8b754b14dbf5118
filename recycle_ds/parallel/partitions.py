"""Which elements each replica holds under ZeRO: pure functions, for training, checks and plans alike."""

from __future__ import annotations

from collections.abc import Sequence


def partition_size(elements: int, replicas: int) -> int:
    """ZeRO-3: elements of every replica's partition; the last ones are padded where `replicas` does not divide `elements`."""
    return -(-elements // replicas)


def partition_range(elements: int, replicas: int, rank: int) -> range:
    """The elements of the flattened parameter that replica `rank` holds; empty on ranks that hold padding only."""
    size = partition_size(elements, replicas)
    return range(min(rank * size, elements), min((rank + 1) * size, elements))


def flat_partitions(sizes: Sequence[int], replicas: int) -> list[list[tuple[int, range]]]:
    """ZeRO-1 and 2: what each replica holds of the parameters of a group, as (index, elements of the flattened parameter).

    DeepSpeed lays a group's parameters end to end, pads the end to a multiple of 2 x replicas elements (NCCL wants 4-byte
    alignment of bf16 numbers) and cuts that into equal parts, through parameters. Padding belongs to no parameter.
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
