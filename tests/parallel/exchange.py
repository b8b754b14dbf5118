"""Attention on Ulysses ranks, with DeepSpeed's own implementation, and on one rank with the full sequence."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH, BATCH, HEADS, KV_HEADS, CHANNELS = 12, 3, 8, 4, 6
Gradients = tuple[Tensor, Tensor, Tensor]


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Grouped-query attention of [S, B, H, C] queries, keys and values."""
    query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return mixed.permute(2, 0, 1, 3)


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the gradient of the output for the full sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    query, key, value, grad = (torch.randn(LENGTH, BATCH, count, CHANNELS, generator=generator) for count in heads)
    return query, key, value, grad


def run(rank: int, world_size: int) -> dict[str, tuple[Tensor, Gradients]]:
    """Output and gradients of this rank's part: ours, DeepSpeed's, and those of the full sequence."""
    from deepspeed.sequence.layer import DistributedAttention

    from recycle_ds.config import ParallelConfig
    from recycle_ds.model.ulysses import to_heads, to_sequence
    from recycle_ds.parallel import rendezvous
    from recycle_ds.parallel.mesh import build_mesh

    rendezvous.start(rendezvous.detect_launch(os.environ))
    axis = build_mesh(ParallelConfig(ulysses=world_size), torch.device("cpu")).ulysses
    query, key, value, grad = tensors()

    def ours(*parts: Tensor) -> Tensor:
        return to_sequence(causal(*to_heads(parts, axis)), axis)

    deepspeed_attention = DistributedAttention(causal, axis.group, scatter_idx=2, gather_idx=0)  # type: ignore[arg-type]
    own = slice(rank * LENGTH // world_size, (rank + 1) * LENGTH // world_size)
    split = tuple(part[own] for part in (query, key, value))
    found = {
        "ours": differentiate(ours, split, grad[own]),
        "deepspeed": differentiate(lambda *parts: deepspeed_attention(*parts, 1), split, grad[own]),
    }
    output, gradients = differentiate(causal, (query, key, value), grad)
    found["full"] = (output[own], tuple(g[own] for g in gradients))  # type: ignore[assignment]
    return found


def differentiate(function: Any, parts: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Gradients]:
    """The output, and the gradients of its product with `grad`."""
    leaves = [part.clone().requires_grad_() for part in parts]
    output = function(*leaves)
    query, key, value = torch.autograd.grad(output, leaves, grad)
    return output.detach(), (query, key, value)


def inverse(rank: int, world_size: int) -> bool:
    """Whether two exchanges restore their input bit for bit."""
    from recycle_ds.config import ParallelConfig
    from recycle_ds.model.ulysses import gather_sequence, to_heads, to_sequence
    from recycle_ds.parallel import rendezvous
    from recycle_ds.parallel.mesh import build_mesh

    rendezvous.start(rendezvous.detect_launch(os.environ))
    axis = build_mesh(ParallelConfig(ulysses=world_size), torch.device("cpu")).ulysses
    query, key, value, _ = tensors()
    own = slice(rank * LENGTH // world_size, (rank + 1) * LENGTH // world_size)
    parts = to_heads((query[own], key[own], value[own]), axis)
    width = [part.shape[2] for part in parts]
    held = all(
        torch.equal(part, whole[:, :, rank * count : (rank + 1) * count])
        for part, whole, count in zip(parts, (query, key, value), width, strict=True)
    )
    back = all(
        torch.equal(to_sequence(part.contiguous(), axis), whole[own])
        for part, whole in zip(parts, (query, key, value), strict=True)
    )
    return held and back and torch.equal(gather_sequence(query[own], axis), query)
