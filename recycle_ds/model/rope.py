"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated as in LLaMA, with context extension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from recycle_ds.config import RopeConfig, RopeScaling


class Rotary(nn.Module):
    """Cosines and sines of every position up to the longest context, looked up once per forward pass."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, channels: int, max_positions: int, config: RopeConfig) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(max_positions).double(), frequencies(channels, config))
        self.register_buffer("cosine", angles.cos().float(), persistent=False)
        self.register_buffer("sine", angles.sin().float(), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[S, B] positions to cosines and sines, each [S, B, 1, C/2]."""
        return self.cosine[positions].unsqueeze(2).to(dtype), self.sine[positions].unsqueeze(2).to(dtype)


def rotate(x_SBHC: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel pairs (i, i + C/2) by their position's angle."""
    if torch.is_grad_enabled() and x_SBHC.requires_grad:
        return _Rotate.apply(x_SBHC, *rotary)
    return _turn(x_SBHC, *rotary)


class _Rotate(torch.autograd.Function):
    """A rotation is undone by its transpose: the backward pass needs the angles only, not the activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turn(grad, cosine, -sine), None, None


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = turned.chunk(2, dim=-1)
    torch.mul(first, cosine, out=left).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=right).addcmul_(first, sine)
    return turned


def frequencies(channels: int, config: RopeConfig) -> Tensor:
    """[C/2] radians per position, highest first, float64, after any scaling."""
    # integers first: inside deepspeed.zero.Init a constructor's floats come out in the training type
    base = config.theta ** (-torch.arange(0, channels, 2).double() / channels)
    return base if config.scaling is None else _scale(base, config.scaling)


def _scale(base: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return base / scaling.factor
    # llama3 (Llama 3.1 model card): keep short wavelengths, stretch long ones, interpolate in between.
    turns = scaling.original_positions * base / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (kept + (1 - kept) / scaling.factor)
