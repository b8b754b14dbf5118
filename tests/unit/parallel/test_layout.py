"""Ranks and coordinates, as pure functions."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.config import ConfigError, ParallelConfig
from recycle_ds.parallel.layout import Coordinates, Layout, check_node, layout_of

DEGREES = st.sampled_from([1, 2, 3, 4, 8])


@given(DEGREES, DEGREES, DEGREES, DEGREES)
def test_every_rank_has_its_own_coordinates(tensor: int, pipeline: int, data: int, ulysses: int) -> None:
    """Prevents two ranks with the same shard, and a shard without a rank."""
    layout = Layout(tensor, pipeline, data, ulysses)
    coordinates = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(coordinates)) == layout.world_size == tensor * pipeline * data * ulysses
    assert [layout.rank_of(at) for at in coordinates] == list(range(layout.world_size))


def test_all_of_1024_ranks() -> None:
    """Prevents tensor groups that span nodes, and stages that are not contiguous, at the size of a large cluster."""
    layout = Layout(tensor=8, pipeline=4, data=32)
    for rank in range(1024):
        at = layout.coordinates(rank)
        assert at == Coordinates(rank // 256, rank // 8 % 32, 0, rank % 8)
        peers = {layout.rank_of(Coordinates(at.pipeline, at.data, 0, tensor)) for tensor in range(8)}
        assert {peer // 8 for peer in peers} == {rank // 8}, "a tensor group spans nodes of 8"


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(2, 2, 2), (4, 2, 1), (1, 4, 3), (8, 4, 32)])
def test_order_is_deepspeeds(tensor: int, pipeline: int, data: int) -> None:
    """Prevents a rank order that differs between DeepSpeed's pipeline grid and the mesh."""
    topology = PipeModelDataParallelTopology(pipeline, tensor, data)
    layout = Layout(tensor, pipeline, data)
    for rank in range(layout.world_size):
        expected, actual = topology.get_coord(rank), layout.coordinates(rank)
        assert (expected.pipe, expected.data, expected.model) == (actual.pipeline, actual.data, actual.tensor)


def test_layout_must_fill_the_world() -> None:
    """Prevents a layout that leaves some ranks unused, and an error message without the numbers."""
    assert layout_of(ParallelConfig(tensor=2, pipeline=2), 8) == Layout(2, 2, 2)
    with pytest.raises(ConfigError, match=r"parallel.tensor \(3\) x .* = 3 must divide the number of ranks \(8\)"):
        layout_of(ParallelConfig(tensor=3), 8)
    with pytest.raises(ConfigError, match=r"parallel.pipeline \(4\) .* = 16 must divide the number of ranks \(8\)"):
        layout_of(ParallelConfig(tensor=4, pipeline=4), 8)


def test_tensor_groups_stay_inside_a_node() -> None:
    """Prevents all-reduces of every layer over the slow network because groups of eight ranks span nodes of four."""
    check_node(ParallelConfig(tensor=4), 16, 8)
    check_node(ParallelConfig(tensor=8), 8, 8)
    check_node(ParallelConfig(tensor=8), 16, 0)
    with pytest.raises(ConfigError, match=r"parallel.tensor \(8\) must divide the ranks of a node \(4\)"):
        check_node(ParallelConfig(tensor=8), 16, 4)
