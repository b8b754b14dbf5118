"""Hugging Face models whose layers DeepSpeed AutoTP split over tensor ranks ("tensor_parallel": {"autotp_size": n}).

Each rank holds rows of the query, key, value, gate, up and vocabulary matrices, and columns of the output matrices of attention
and feed-forward, in rank order. All other tensors are replicated:
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


def split(name: str, shape: Shape, local: Sequence[Shape | None]) -> tuple[tuple[Shard, ...], list[Shape]]:
    """Returns the shards of a canonical tensor and the shape expected of every rank. local: the shape that each rank holds.

    If the local shapes do not add up to the tensor, the full shape is expected of every rank, and the later check reports it.
    """
    parameter = hugging_face_name(name)
    axis = 1 if _BY_COLUMNS.search(parameter) else 0
    sizes = [found[axis] for found in local if found is not None and _equal_except(found, shape, axis)]
    if len(local) == 1 or len(sizes) < len(local) or sum(sizes) != shape[axis]:
        return (Shard(0, parameter, Piece(name, shape, 0, 0, shape[0], 0)),), [shape] * len(local)
    shards, start = [], 0
    for rank, size in enumerate(sizes):
        shards.append(Shard(rank, parameter, Piece(name, shape, axis, start, size, 0)))
        start += size
    return tuple(shards), [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def check_order(files: PtFiles, inventory: Inventory, shards: Mapping[str, tuple[Shard, ...]]) -> None:
    """Compares the shards with the partition map that DeepSpeed 0.19 saves. Raises CheckpointError if they differ."""
    for rank in range(inventory.tensor):
        file = inventory.model[rank, 0]
        saved_map = files.find(file, _MAP)
        if not isinstance(saved_map, dict):  # saved by an older release
            continue
        for row in shards.values():
            for shard in row:
                entry = saved_map.get(f"^{re.escape(shard.parameter)}$")
                if len(row) > 1 and shard.rank == rank and entry is not None and not _matches(entry, shard):
                    raise CheckpointError(
                        f"{files.folder / file}: {shard.parameter} is not split into consecutive parts in tensor-rank order: "
                        "save it with DeepSpeed's built-in plan for Hugging Face models, without a partition_config"
                    )


def _matches(entry: object, shard: Shard) -> bool:
    """Whether a map's entry describes the rank's part as one piece that starts and ends where the shard does."""
    piece = shard.piece
    first = piece.start * math.prod(piece.shape[piece.axis + 1 :])
    try:
        (part,) = entry["ranks"][shard.rank]["pieces"]  # type: ignore[index]
        source, local, strides = part["source"], part["dest"], _strides(piece.shape)
        same_size = math.prod(part["shape"]) == math.prod(piece.shape) // piece.shape[piece.axis] * piece.length
        return same_size and source[0] == first and local[0] == 0 and tuple(source[1]) == strides
    except (KeyError, IndexError, TypeError, ValueError):
        return False


def _strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _equal_except(one: Shape, other: Shape, axis: int) -> bool:
    """Whether two shapes are equal in all axes but `axis`."""
    return len(one) == len(other) and all(
        size == wanted for at, (size, wanted) in enumerate(zip(one, other, strict=True)) if at != axis
    )
