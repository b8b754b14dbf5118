"""Canonical names: which part of the unsharded model each local parameter is.

Checkpoints, conversions and initial weights use canonical tensors: separate query, key and value, separate gate and up, and no
vocabulary padding. A `Piece` maps a slice of a canonical tensor to a slice of a local parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recycle_ds.model.layers import ColumnLinear, OutputHead, RowLinear, VocabEmbedding
from recycle_ds.parallel.mesh import Axis, Mesh
from recycle_ds.parallel.partitions import local_shape


@dataclass(frozen=True)
class Piece:
    """canonical `name`[start : start + length] along `axis` = local[local_start : local_start + length] along `axis`."""

    name: str
    shape: tuple[int, ...]
    axis: int
    start: int
    length: int
    local_start: int

    @property
    def whole(self) -> bool:
        """Whether the piece is the full canonical tensor."""
        return self.length == self.shape[self.axis]


def pieces(model: nn.Module, mesh: Mesh) -> dict[str, tuple[Piece, ...]]:
    """The pieces of every local parameter, by parameter name. ZeRO-3's parameters have their unpartitioned shape."""
    table: dict[str, tuple[Piece, ...]] = {}
    for prefix, module in model.named_modules():
        for suffix, parameter in module.named_parameters(recurse=False):
            table[f"{prefix}.{suffix}"] = _describe(module, prefix, suffix, local_shape(parameter), mesh.tensor)
    return table


def is_copy(name: str, mesh: Mesh) -> bool:
    """Whether a local parameter is the last stage's copy of the embedding. Only the first stage's is counted and saved."""
    return mesh.pipeline.size > 1 and mesh.last_stage and name == "embedding.weight"


def canonical_shapes(table: dict[str, tuple[Piece, ...]]) -> dict[str, tuple[int, ...]]:
    """Full shape of each canonical tensor in a table of pieces."""
    return {piece.name: piece.shape for row in table.values() for piece in row}


def is_sharded(module: nn.Module, suffix: str) -> bool:
    """Whether tensor ranks hold different parts of this parameter (rather than copies)."""
    return isinstance(module, ColumnLinear | VocabEmbedding) or (isinstance(module, RowLinear) and suffix == "weight")


def _describe(module: nn.Module, prefix: str, suffix: str, shape: tuple[int, ...], axis: Axis) -> tuple[Piece, ...]:
    if isinstance(module, VocabEmbedding | OutputHead):
        return _vocabulary(f"{prefix}.{suffix}", module.vocab_size, shape, axis)
    if isinstance(module, ColumnLinear):
        return _column(prefix, suffix, module.parts, shape, axis)
    if isinstance(module, RowLinear):
        columns = shape[1]
        full = (shape[0], columns * axis.size)
        return (Piece(f"{prefix}.{suffix}", full, 1, columns * axis.rank, columns, 0),)
    return (Piece(f"{prefix}.{suffix}", shape, 0, 0, shape[0], 0),)


def _column(prefix: str, suffix: str, parts: dict[str, int], shape: tuple[int, ...], axis: Axis) -> tuple[Piece, ...]:
    parent = prefix.rpartition(".")[0]
    found, local = [], 0
    for part, rows in parts.items():
        name = f"{parent}.{part}.{suffix}" if part else f"{prefix}.{suffix}"
        length = rows // axis.size
        found.append(Piece(name, (rows, *shape[1:]), 0, length * axis.rank, length, local))
        local += length
    return tuple(found)


def _vocabulary(name: str, vocab_size: int, shape: tuple[int, ...], axis: Axis) -> tuple[Piece, ...]:
    first = shape[0] * axis.rank
    length = min(vocab_size - first, shape[0])
    if length <= 0:  # padding only
        return ()
    return (Piece(name, (vocab_size, *shape[1:]), 0, first, length, 0),)
