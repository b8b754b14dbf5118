"""Which elements of a parameter each replica holds under ZeRO-3: a pure function, for training, checks and plans alike."""

from __future__ import annotations


def partition_size(elements: int, replicas: int) -> int:
    """Elements of every replica's partition; the last ones are padded where `replicas` does not divide `elements`."""
    return -(-elements // replicas)


def partition_range(elements: int, replicas: int, rank: int) -> range:
    """The elements of the flattened parameter that replica `rank` holds; empty on ranks that hold padding only."""
    size = partition_size(elements, replicas)
    return range(min(rank * size, elements), min((rank + 1) * size, elements))
