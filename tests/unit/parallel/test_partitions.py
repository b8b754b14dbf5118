"""ZeRO-3's partitions of a parameter, as a pure function."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.parallel.partitions import partition_range, partition_size


@given(st.integers(1, 5000), st.integers(1, 1024))
def test_partitions_tile_a_parameter(elements: int, replicas: int) -> None:
    """An element that no replica updates, or that two do: with fewer elements than replicas too."""
    ranges = [partition_range(elements, replicas, rank) for rank in range(replicas)]
    assert [element for part in ranges for element in part] == list(range(elements))
    size = partition_size(elements, replicas)
    assert all(len(part) <= size for part in ranges)
    assert elements <= size * replicas < elements + replicas, "no more padding than one element a replica"
