"""ZeRO's partitions, as pure functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.parallel.partitions import flat_partitions, partition_range, partition_size


@given(st.integers(1, 5000), st.integers(1, 1024))
def test_partitions_tile_a_parameter(elements: int, replicas: int) -> None:
    """Prevents elements that no replica or two replicas update, also with fewer elements than replicas."""
    ranges = [partition_range(elements, replicas, rank) for rank in range(replicas)]
    assert [element for part in ranges for element in part] == list(range(elements))
    size = partition_size(elements, replicas)
    assert all(len(part) <= size for part in ranges)
    assert elements <= size * replicas < elements + replicas, "at most one element of padding per replica"


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 40))
def test_flat_partitions_tile_a_group(sizes: list[int], replicas: int) -> None:
    """Prevents elements of concatenated parameters that no or two replicas update, also if some have only padding."""
    held = flat_partitions(sizes, replicas)
    assert len(held) == replicas
    found = [(index, element) for part in held for index, elements in part for element in elements]
    assert found == [(index, element) for index, size in enumerate(sizes) for element in range(size)]
    assert max(sum(len(elements) for _, elements in part) for part in held) <= -(-sum(sizes) // (2 * replicas)) * 2


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [[1], [7, 5, 1], [100, 3, 64, 64], [16, 16]])
def test_flat_partitions_are_deepspeeds(sizes: list[int], replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents flat partitions whose padding or boundaries differ from DeepSpeed's."""
    from deepspeed.runtime.utils import align_dense_tensors
    from deepspeed.runtime.zero import stage_1_and_2 as deepspeed_zero

    monkeypatch.setattr(deepspeed_zero.dist, "get_world_size", lambda group: replicas)
    numbered = list(torch.arange(1, sum(sizes) + 1).split(sizes))
    unit = 2 * replicas  # its nccl_start_alignment_factor times the replicas
    flat = torch.cat(align_dense_tensors(numbered, unit))
    zero = SimpleNamespace(real_dp_process_group=[None])
    expected = deepspeed_zero.DeepSpeedZeroOptimizer.get_data_parallel_partitions(zero, flat, 0)
    ours = [[numbered[index][list(elements)] for index, elements in part] for part in flat_partitions(sizes, replicas)]
    assert len(expected) == len(ours)
    for part, pieces in zip(expected, ours, strict=True):
        joined = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
        assert part[part > 0].equal(joined)
