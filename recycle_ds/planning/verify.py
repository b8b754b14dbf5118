"""Builds every distinct part of a layout on the meta device, and checks that the parts tile the model exactly."""

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


def build_part(config: RunConfig, layout: Layout, at: Coordinates, *, sequence: bool) -> RecycleGPT:
    """The part of the model at these coordinates, on the meta device: without memory or initial values."""
    mesh = virtual_mesh(layout, layout.rank_of(at), sequence=sequence)
    with torch.device("meta"):
        return build_model(config.model, config.recycle, mesh, seed=None, seq_length=config.training.seq_length)


def verify_layout(config: RunConfig, layout: Layout, *, sequence: bool = False) -> int:
    """Checks one layout and returns the number of parts built. Raises PlanningError naming what is missing or duplicated.

    Data replicas hold the same weights, so each (tensor, pipeline) coordinate is built once. That ZeRO's partitions cover each
    parameter is checked by arithmetic: for ZeRO-3 with the function that training uses, for ZeRO-1 and 2 with DeepSpeed's rule.
    """
    tiles: dict[str, list[Piece]] = {}
    first_embeddings: list[tuple[Piece, ...]] = []
    built = 0
    with world_of_one():
        expected = whole_shapes(config.model, config.recycle)
        for pipeline in range(layout.pipeline):
            for tensor in range(layout.tensor):
                model = build_part(config, layout, Coordinates(pipeline, 0, 0, tensor), sequence=sequence)
                _collect(model, tiles)
                if pipeline == 0:
                    first_embeddings.append(pieces(model, model.mesh)["embedding.weight"])
                else:
                    check_copy(model, first_embeddings[tensor])
                check_partitions(model, layout.replicas)
                built += 1
    check_tiling(expected, tiles)
    count = sum(torch.Size(shape).numel() for shape in expected.values())
    if count != parameters(config.model, config.recycle):
        raise PlanningError(
            f"the model has {count} weights, but its formula gives {parameters(config.model, config.recycle)}"
        )
    return built


def _collect(model: RecycleGPT, tiles: dict[str, list[Piece]]) -> None:
    for name, row in pieces(model, model.mesh).items():
        if is_copy(name, model.mesh):
            continue
        for piece in row:
            # tensors that are replicated over tensor ranks (norms) count once
            if not piece.whole or model.mesh.tensor.rank == 0:
                tiles.setdefault(piece.name, []).append(piece)


def check_copy(model: RecycleGPT, first: Sequence[Piece]) -> None:
    """Checks that a stage's copy of the embedding, if any, has the first stage's rows. Raises PlanningError otherwise."""
    for name, row in pieces(model, model.mesh).items():
        if is_copy(name, model.mesh) and list(row) != list(first):
            raise PlanningError(
                f"{name}: the last stage's copy at tensor rank {model.mesh.tensor.rank} has {_rows(row)}, the first stage has "
                f"{_rows(first)}"
            )


def _rows(row: Sequence[Piece]) -> str:
    return ", ".join(f"rows {piece.start} to {piece.start + piece.length}" for piece in row) or "padding only"


def check_tiling(expected: dict[str, tuple[int, ...]], tiles: dict[str, list[Piece]]) -> None:
    """Checks that the pieces cover every canonical tensor exactly once. Raises PlanningError otherwise."""
    for name in sorted(expected.keys() ^ tiles.keys()):
        raise PlanningError(f"{name}: {'no part has it' if name in expected else 'not a tensor of the model'}")
    for name, found in tiles.items():
        shape, end = expected[name], 0
        for piece in sorted(found, key=lambda piece: piece.start):
            if piece.shape != shape:
                raise PlanningError(f"{name}: has shape {list(piece.shape)} in a part, {list(shape)} in the model")
            if piece.start != end:
                raise PlanningError(
                    f"{name}: rows {end} to {piece.start} are {'missing' if piece.start > end else 'duplicated'}"
                )
            end = piece.start + piece.length
        if end != shape[found[0].axis]:
            raise PlanningError(f"{name}: the parts cover {end} of {shape[found[0].axis]} rows")


def check_partitions(model: RecycleGPT, replicas: int) -> None:
    """Checks that ZeRO's partitions cover every parameter of a part exactly once. Raises PlanningError otherwise.

    ZeRO-3 partitions each parameter separately, ZeRO-1 and 2 the flattened parameter groups of the optimizer.
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
    """Checks that the replicas' parts of a flattened group cover each element exactly once. Raises PlanningError otherwise."""
    ranges: list[list[range]] = [[] for _ in sizes]
    for part in held:
        for index, elements in part:
            ranges[index].append(elements)
    for name, size, found in zip(names, sizes, ranges, strict=True):
        check_cover(name, size, found)


def check_cover(name: str, elements: int, ranges: Sequence[range]) -> None:
    """Checks that the ranges, in order, cover each element exactly once. Raises PlanningError otherwise."""
    end = 0
    for rank, held in enumerate(ranges):
        if held.start != end:
            problem = "missing" if held.start > end else "duplicated"
            raise PlanningError(f"{name}: elements {end} to {held.start} are {problem} before ZeRO partition {rank}")
        end = held.stop
    if end != elements:
        raise PlanningError(f"{name}: {len(ranges)} ZeRO partitions cover {end} of {elements} elements")
