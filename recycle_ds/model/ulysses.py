"""DeepSpeed Ulysses (Jacobs et al., arXiv 2309.14509): sequences split over ranks, attention split over heads.

Outside attention a rank holds S/u positions of every sequence; inside attention it holds all S positions of H/u heads. One
all-to-all before attention and one after it move 1/u of the activations each, so a rank sends less as the degree u grows.

DeepSpeed's own DistributedAttention exchanges queries, keys and values one after another and does not return the keys. Here one
all-to-all exchanges all three, and the recycle module keeps the keys of earlier steps in the layout used inside attention.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor

from recycle_ds.parallel.mesh import Axis


def to_heads(parts: tuple[Tensor, ...], axis: Axis) -> tuple[Tensor, ...]:
    """[S/u, B, H_i, C] each to [S, B, H_i/u, C]: all positions of this rank's heads. u divides every H_i. Collective."""
    length, batch, _, channels = parts[0].shape
    counts = [part.shape[2] // axis.size for part in parts]
    by_rank = [part.reshape(length, batch, axis.size, -1, channels) for part in parts]
    outgoing = torch.cat(by_rank, dim=3).permute(2, 0, 1, 3, 4)
    incoming = all_to_all(axis.group, outgoing.reshape(axis.size * length, batch, sum(counts), channels))
    return incoming.split(counts, dim=2)


def to_sequence(mixed_SBHC: Tensor, axis: Axis) -> Tensor:
    """[S, B, H/u, C] to [S/u, B, H, C]: all heads of this rank's positions. The inverse of `to_heads`. Collective."""
    length, batch, heads, channels = mixed_SBHC.shape
    incoming = all_to_all(axis.group, mixed_SBHC)
    by_rank = incoming.view(axis.size, length // axis.size, batch, heads, channels)
    return by_rank.permute(1, 2, 0, 3, 4).reshape(length // axis.size, batch, axis.size * heads, channels)


def gather_sequence(part_S: Tensor, axis: Axis) -> Tensor:
    """[S/u, ...] to [S, ...] on every rank, without a gradient. Collective."""
    parts = [torch.empty_like(part_S) for _ in range(axis.size)]
    dist.all_gather(parts, part_S.contiguous(), group=axis.group)
    return torch.cat(parts)
