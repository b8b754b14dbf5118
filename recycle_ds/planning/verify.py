"""Builds every distinct part of a layout, on the meta device, and checks that the parts tile the model exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recycle_ds.config import RunConfig
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.build import whole_shapes
from recycle_ds.model.flops import parameters
from recycle_ds.model.sharding import Piece, is_copy, pieces
from recycle_ds.parallel.layout import Coordinates, Layout
from recycle_ds.parallel.mesh import virtual_mesh, world_of_one
from recycle_ds.parallel.partitions import flat_partitions, partition_range
from recycle_ds.planning.errors import PlanningError
from recycle_ds.training.engine.optimizer import parameter_groups


def build_part(config: RunConfig, layout: Layout, place: Coordinates, *, sequence: bool) -> RecycleGPT:
    """The model of one coordinate, without memory or initial values."""
    mesh = virtual_mesh(layout, layout.rank_of(place), sequence=sequence)
    with torch.device("meta"):
        return build_model(config.model, config.recycle, mesh, seed=None, seq_length=config.training.seq_length)


def verify_layout(config: RunConfig, layout: Layout, *, sequence: bool = False) -> int:
    """Checks one layout; returns the number of parts built. Raises PlanningError naming what is missing or doubled.

    Data replicas hold what their first one holds, so each (tensor, pipeline) coordinate is built once; that ZeRO's partitions
    cover each of its parameters is checked by arithmetic: ZeRO-3's by the function that cuts them in training, ZeRO-1 and 2's
    by DeepSpeed's rule.
    """
    tiles: dict[str, list[Piece]] = {}
    firsts: list[tuple[Piece, ...]] = []
    built = 0
    with world_of_one():
        expected = whole_shapes(config.model, config.recycle)
        for pipeline in range(layout.pipeline):
            for tensor in range(layout.tensor):
                model = build_part(config, layout, Coordinates(pipeline, 0, 0, tensor), sequence=sequence)
                _collect(model, tiles)
                if pipeline == 0:
                    firsts.append(pieces(model, model.mesh)["embedding.weight"])
                else:
                    check_copy(model, firsts[tensor])
                check_partitions(model, layout.replicas)
                built += 1
    check_tiling(expected, tiles)
    count = sum(torch.Size(shape).numel() for shape in expected.values())
    if count != parameters(config.model, config.recycle):
        raise PlanningError(f"the model has {count} weights, by its shapes {parameters(config.model, config.recycle)}")
    return built


def _collect(model: RecycleGPT, tiles: dict[str, list[Piece]]) -> None:
    for name, row in pieces(model, model.mesh).items():
        if is_copy(name, model.mesh):
            continue
        for piece in row:
            # what tensor ranks hold alike (norms) counts once
            if not piece.whole or model.mesh.tensor.rank == 0:
                tiles.setdefault(piece.name, []).append(piece)


def check_copy(model: RecycleGPT, first: Sequence[Piece]) -> None:
    """Whether a stage's copy of the embedding, where it has one, is the first stage's piece. Raises PlanningError."""
    for name, row in pieces(model, model.mesh).items():
        if is_copy(name, model.mesh) and list(row) != list(first):
            raise PlanningError(
                f"{name}: the last stage's copy at tensor rank {model.mesh.tensor.rank} is {_rows(row)}, the first stage has "
                f"{_rows(first)}"
            )


def _rows(row: Sequence[Piece]) -> str:
    return ", ".join(f"rows {piece.start} to {piece.start + piece.length}" for piece in row) or "padding only"


def check_tiling(expected: dict[str, tuple[int, ...]], tiles: dict[str, list[Piece]]) -> None:
    """Whether the pieces cover every canonical tensor once. Raises PlanningError."""
    for name in sorted(expected.keys() ^ tiles.keys()):
        raise PlanningError(f"{name}: {'no part holds it' if name in expected else 'not a tensor of the model'}")
    for name, found in tiles.items():
        shape, end = expected[name], 0
        for piece in sorted(found, key=lambda piece: piece.start):
            if piece.shape != shape:
                raise PlanningError(f"{name}: a part takes it for {list(piece.shape)}, the model has {list(shape)}")
            if piece.start != end:
                raise PlanningError(
                    f"{name}: rows {end} to {piece.start} are {'missing' if piece.start > end else 'doubled'}"
                )
            end = piece.start + piece.length
        if end != shape[found[0].axis]:
            raise PlanningError(f"{name}: ends at {end} of {shape[found[0].axis]}")


def check_partitions(model: RecycleGPT, replicas: int) -> None:
    """Whether ZeRO's partitions over the replicas cover every parameter of a part once. Raises PlanningError.

    Stage 3 cuts each parameter by itself, stages 1 and 2 the flattened groups of the optimizer.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        elements = parameter.numel()
        check_cover(name, elements, [partition_range(elements, replicas, rank) for rank in range(replicas)])
    for group in parameter_groups(model, 0.0):
        members = group["params"]
        sizes = [parameter.numel() for parameter in members]
        check_flat([names[parameter] for parameter in members], sizes, flat_partitions(sizes, replicas))


def check_flat(names: Sequence[str], sizes: Sequence[int], held: Sequence[Sequence[tuple[int, range]]]) -> None:
    """Whether the replicas' parts of a flattened group hold each element of its parameters once. Raises PlanningError."""
    ranges: list[list[range]] = [[] for _ in sizes]
    for part in held:
        for index, elements in part:
            ranges[index].append(elements)
    for name, size, found in zip(names, sizes, ranges, strict=True):
        check_cover(name, size, found)


def check_cover(name: str, elements: int, ranges: Sequence[range]) -> None:
    """Whether ranges, in order, hold each of the elements once. Raises PlanningError."""
    end = 0
    for rank, held in enumerate(ranges):
        if held.start != end:
            fault = "missing" if held.start > end else "doubled"
            raise PlanningError(f"{name}: elements {end} to {held.start} are {fault} before ZeRO partition {rank}")
        end = held.stop
    if end != elements:
        raise PlanningError(f"{name}: {len(ranges)} ZeRO partitions cover {end} of {elements} elements")
