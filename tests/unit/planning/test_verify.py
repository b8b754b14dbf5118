"""All parts of large layouts, built on the meta device: together they tile the model."""

from __future__ import annotations

from functools import lru_cache

import pytest

from recycle_ds.config import RunConfig
from recycle_ds.model.build import whole_shapes
from recycle_ds.model.sharding import Piece, pieces
from recycle_ds.parallel.layout import Coordinates, Layout
from recycle_ds.parallel.mesh import world_of_one
from recycle_ds.parallel.partitions import flat_partitions
from recycle_ds.planning import command
from recycle_ds.planning.errors import PlanningError
from recycle_ds.planning.verify import (
    build_part,
    check_copy,
    check_cover,
    check_flat,
    check_tiling,
    verify_layout,
)
from tests.runs import ROOT


@lru_cache
def preset(name: str) -> RunConfig:
    if name == "odd":  # no recycle module, so the hidden width is not split
        sizes = ["model.heads=4", "model.kv_heads=2", "model.hidden=63", "model.head_dim=16", "recycle.layers=0"]
        return command.read_run(str(ROOT / "ds_configs/runs/demo.yaml"), ["model.vocab_size=1000", *sizes])
    return command.read_run(str(ROOT / "ds_configs" / "runs" / f"{name}.yaml"), [])


@pytest.mark.parametrize(("name", "layout"), [
    ("recyclegpt_1.3b", Layout(tensor=2, pipeline=2, data=2)),
    ("recyclegpt_1.3b", Layout(tensor=4, pipeline=2, data=8)),
    ("recyclegpt_1.3b", Layout(tensor=2, pipeline=4, data=128)),
    ("7b", Layout(tensor=8)),
    ("7b", Layout(tensor=4, pipeline=4, data=4)),
    ("7b", Layout(tensor=2, pipeline=8, data=64)),
    ("70b", Layout(tensor=8)),
    ("70b", Layout(tensor=8, pipeline=4, data=2)),
    ("70b", Layout(tensor=4, pipeline=8, data=32)),
    ("odd", Layout(tensor=2, pipeline=2, data=2)),
])  # fmt: skip
def test_parts_tile_the_model(name: str, layout: Layout) -> None:
    """Prevents rows of a weight that none of 8, 64 or 1,024 ranks has, or that two stages train independently."""
    assert layout.world_size in (8, 64, 1024)
    assert verify_layout(preset(name), layout, sequence=True) == layout.tensor * layout.pipeline


def test_parts_take_no_memory() -> None:
    """Prevents an allocation of 70 billion weights to check a plan."""
    with world_of_one():
        part = build_part(preset("70b"), Layout(tensor=8, pipeline=4), Coordinates(1, 0, 0, 3), sequence=True)
    assert all(parameter.is_meta for parameter in part.parameters())


@pytest.fixture
def tiles() -> tuple[dict[str, tuple[int, ...]], dict[str, list[Piece]]]:
    """The model's shapes and the pieces of both tensor ranks."""
    config, layout = preset("recyclegpt_1.3b"), Layout(tensor=2)
    found: dict[str, list[Piece]] = {}
    with world_of_one():
        for tensor in range(2):
            model = build_part(config, layout, Coordinates(0, 0, 0, tensor), sequence=False)
            for row in pieces(model, model.mesh).values():
                for piece in row:
                    if not piece.whole or tensor == 0:
                        found.setdefault(piece.name, []).append(piece)
        return whole_shapes(config.model, config.recycle), found


@pytest.mark.parametrize(("fault", "message"), [
    ("lost", "blocks.3.mlp.down.weight: the parts cover"),
    ("duplicated", "blocks.3.mlp.down.weight: rows .* are duplicated"),
    ("absent", "blocks.3.mlp.down.weight: no part has it"),
    ("foreign", "blocks.99.mlp.down.weight: not a tensor of the model"),
])  # fmt: skip
def test_a_wrong_part_is_found(
    tiles: tuple[dict[str, tuple[int, ...]], dict[str, list[Piece]]], fault: str, message: str
) -> None:
    """Prevents a check that passes with any parts."""
    expected, found = tiles
    check_tiling(expected, found)
    name = "blocks.3.mlp.down.weight"
    if fault == "lost":
        found[name].pop()
    elif fault == "duplicated":
        found[name].append(found[name][0])
    elif fault == "absent":
        del found[name]
    else:
        found["blocks.99.mlp.down.weight"] = found[name]
    with pytest.raises(PlanningError, match=message):
        check_tiling(expected, found)


@pytest.mark.parametrize(("ranges", "message"), [
    ([range(0, 4), range(4, 8)], "2 ZeRO partitions cover 8 of 9 elements"),
    ([range(0, 5), range(6, 9)], "elements 5 to 6 are missing before ZeRO partition 1"),
    ([range(0, 5), range(4, 9)], "elements 5 to 4 are duplicated before ZeRO partition 1"),
])  # fmt: skip
def test_a_wrong_partition_is_found(ranges: list[range], message: str) -> None:
    """Prevents a check that passes with any ZeRO partitions over replicas."""
    check_cover("norm.weight", 9, [range(0, 5), range(5, 9)])
    with pytest.raises(PlanningError, match=rf"norm.weight: {message}"):
        check_cover("norm.weight", 9, ranges)


def test_a_wrong_flat_partition_is_found() -> None:
    """Prevents a check that passes with elements of a flattened group that no replica or two replicas update."""
    names, sizes = ["a", "b", "c"], [5, 9, 3]
    held = flat_partitions(sizes, 3)
    check_flat(names, sizes, held)
    with pytest.raises(PlanningError, match="b: 2 ZeRO partitions cover 7 of 9 elements"):
        check_flat(names, sizes, held[:-1])
    with pytest.raises(PlanningError, match=r"b: elements \d+ to \d+ are duplicated"):
        check_flat(names, sizes, [held[0], held[1], *held[1:]])


def test_a_copy_of_other_rows_is_found() -> None:
    """Prevents a last stage whose copy of the embedding has other rows than the first stage's."""
    config, layout = preset("recyclegpt_1.3b"), Layout(tensor=2, pipeline=2)
    with world_of_one():
        first, other, last = (
            build_part(config, layout, Coordinates(stage, 0, 0, tensor), sequence=False)
            for stage, tensor in ((0, 0), (0, 1), (1, 0))
        )
        check_copy(last, pieces(first, first.mesh)["embedding.weight"])
        with pytest.raises(
            PlanningError, match=r"embedding\.weight: the last stage's copy at tensor rank 0 has rows 0 to"
        ):
            check_copy(last, pieces(other, other.mesh)["embedding.weight"])
