"""Causal attention from matrix products: equal to the reference in fp64, and within the rounding error in bf16."""

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
    """Prevents query heads that read another group's keys, rows that attend to later positions, and lost gradients."""
    tensors, grad = inputs(shape)
    mask = mask_of(shape, documents)
    for actual, expected in zip(
        run(cpu_attention.causal, tensors, grad, mask, torch.float64),
        run(reference, tensors, grad, mask, torch.float64),
        strict=True,
    ):
        # sums over blocks are fp32
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_error_is_within_rounding(shape: tuple[int, int, int, int, int]) -> None:
    """Prevents rounding errors that accumulate over keys or blocks beyond a few units in bf16's last place."""
    tensors, grad = inputs(shape)
    rounded = [tensor.bfloat16().float() for tensor in tensors]
    exact = run(reference, rounded, grad.bfloat16().float(), None, torch.float64)
    actual = run(cpu_attention.causal, rounded, grad, None, torch.bfloat16)
    for value, expected in zip(actual, exact, strict=True):
        assert (value.double() - expected).norm() < 4 * 2**-8 * expected.norm()


def test_the_output_has_the_sequence_first_in_memory() -> None:
    """Prevents a copy of the output in every layer only to put the sequence first."""
    tensors, _ = inputs(SHAPES[1])
    mixed = cpu_attention.causal(*(tensor.bfloat16() for tensor in tensors))
    assert mixed.permute(2, 0, 1, 3).is_contiguous()
