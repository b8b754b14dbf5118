"""Hugging Face models whose layers DeepSpeed split over tensor ranks by itself ("tensor_parallel": {"autotp_size": n}).

Ranks hold rows of queries, keys, values, gate, up and the vocabulary, and columns of the attention's and the feed-forward's
output, each in the order of ranks; of the rest every rank holds all:
    rows [ r0 ]    columns [ r0 | r1 ]
         [ r1 ]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recycle_ds.checkpoint.deepspeed_native.files import Inventory
from recycle_ds.checkpoint.deepspeed_native.loading import PtFiles
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.huggingface.names import hugging_face_name
from recycle_ds.model.sharding import Piece

_BY_COLUMNS = re.compile(r"\.(?:self_attn\.o_proj|mlp\.down_proj)\.weight$")
_MAP = ("universal_checkpoint_info", "affine_map", "params")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A piece of a canonical tensor, and the parameter of a model-parallel rank that holds it."""

    rank: int
    parameter: str
    piece: Piece


def split(name: str, shape: Shape, held: Sequence[Shape | None]) -> tuple[tuple[Shard, ...], list[Shape]]:
    """Shards of a canonical tensor, and the shapes that ranks should hold, by those that they do.

    What no cut of the tensor explains is expected whole of every rank: comparing the shapes then names it.
    """
    parameter = hugging_face_name(name)
    axis = 1 if _BY_COLUMNS.search(parameter) else 0
    sizes = [found[axis] for found in held if found is not None and _alike(found, shape, axis)]
    if len(held) == 1 or len(sizes) < len(held) or sum(sizes) != shape[axis]:
        return (Shard(0, parameter, Piece(name, shape, 0, 0, shape[0], 0)),), [shape] * len(held)
    shards, start = [], 0
    for rank, size in enumerate(sizes):
        shards.append(Shard(rank, parameter, Piece(name, shape, axis, start, size, 0)))
        start += size
    return tuple(shards), [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def check_order(files: PtFiles, inventory: Inventory, shards: Mapping[str, tuple[Shard, ...]]) -> None:
    """Compares the cuts with the map that DeepSpeed 0.19 saves of its own. Raises CheckpointError where they differ."""
    for rank in range(inventory.tensor):
        file = inventory.model[rank, 0]
        told = files.find(file, _MAP)
        if not isinstance(told, dict):  # of an older release
            continue
        for row in shards.values():
            for shard in row:
                entry = told.get(f"^{re.escape(shard.parameter)}$")
                if len(row) > 1 and shard.rank == rank and entry is not None and not _agrees(entry, shard):
                    raise CheckpointError(
                        f"{files.folder / file}: {shard.parameter} is not cut into one part after the other by tensor rank: "
                        "save it with DeepSpeed's own plan for Hugging Face models, without a partition_config"
                    )


def _agrees(entry: object, shard: Shard) -> bool:
    """Whether a map's entry says that a rank's part begins where the shard does, and is one piece."""
    piece = shard.piece
    first = piece.start * math.prod(piece.shape[piece.axis + 1 :])
    try:
        (part,) = entry["ranks"][shard.rank]["pieces"]  # type: ignore[index]
        source, local, strides = part["source"], part["dest"], _strides(piece.shape)
        whole = math.prod(part["shape"]) == math.prod(piece.shape) // piece.shape[piece.axis] * piece.length
        return whole and source[0] == first and local[0] == 0 and tuple(source[1]) == strides
    except (KeyError, IndexError, TypeError, ValueError):
        return False


def _strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _alike(one: Shape, other: Shape, axis: int) -> bool:
    """Whether shapes differ along that axis at most."""
    return len(one) == len(other) and all(
        size == wanted for at, (size, wanted) in enumerate(zip(one, other, strict=True)) if at != axis
    )
