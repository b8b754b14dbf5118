"""Causal attention from products: equal to the reference in fp64, and no less exact in bf16 than rounding allows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.model import cpu_attention
from recycle_ds.model.masks import AttentionMask

SHAPES = [(1, 1, 1, 5, 4), (2, 6, 2, 130, 16), (1, 9, 3, 300, 8), (3, 4, 4, 128, 8), (2, 4, 1, 257, 8)]


def inputs(shape: tuple[int, int, int, int, int]) -> tuple[list[Tensor], Tensor]:
    batch, heads, kv_heads, length, channels = shape
    draw = torch.Generator().manual_seed(length)
    tensors = [torch.randn(batch, h, length, channels, generator=draw) for h in (heads, kv_heads, kv_heads)]
    return tensors, torch.randn(batch, heads, length, channels, generator=draw)


def mask_of(shape: tuple[int, int, int, int, int], documents: bool) -> Tensor | None:
    if not documents:
        return None
    batch, length = shape[0], shape[3]
    numbers = torch.arange(length).div(37, rounding_mode="floor").expand(batch, length) + torch.arange(batch)[:, None]
    return AttentionMask(numbers).additive(torch.float64)


def reference(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != keys.shape[1]
    )


def run(function: object, tensors: list[Tensor], grad: Tensor, mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    output = function(*leaves, None if mask is None else mask.to(dtype))  # type: ignore[operator]
    output.backward(grad.to(dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape: tuple[int, int, int, int, int], documents: bool) -> None:
    """Query heads that read another group's keys, a block of rows that sees the future, a gradient of one block lost."""
    tensors, grad = inputs(shape)
    mask = mask_of(shape, documents)
    for mine, theirs in zip(
        run(cpu_attention.causal, tensors, grad, mask, torch.float64),
        run(reference, tensors, grad, mask, torch.float64),
        strict=True,
    ):
        # what blocks add up is fp32
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_as_exact_as_bf16_is(shape: tuple[int, int, int, int, int]) -> None:
    """Rounding that adds up over keys or over blocks: errors beyond a few units of bf16's last place."""
    tensors, grad = inputs(shape)
    rounded = [tensor.bfloat16().float() for tensor in tensors]
    exact = run(reference, rounded, grad.bfloat16().float(), None, torch.float64)
    mine = run(cpu_attention.causal, rounded, grad, None, torch.bfloat16)
    for one, truth in zip(mine, exact, strict=True):
        assert (one.double() - truth).norm() < 4 * 2**-8 * truth.norm()


def test_the_output_is_laid_out_for_what_follows() -> None:
    """A copy of the whole output in every layer, made only to put the sequence first."""
    tensors, _ = inputs(SHAPES[1])
    mixed = cpu_attention.causal(*(tensor.bfloat16() for tensor in tensors))
    assert mixed.permute(2, 0, 1, 3).is_contiguous()
