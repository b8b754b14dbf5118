"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated as in LLaMA, with context extension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from recycle_ds.config import RopeConfig, RopeScaling

CosineSine = tuple[Tensor, Tensor]
"""Cosines and sines of the positions of a pass, each [S, B, 1, C/2]."""


class Rotary(nn.Module):
    """Cosines and sines of every position up to the longest context, looked up once per forward pass."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, channels: int, max_positions: int, config: RopeConfig) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(max_positions).double(), frequencies(channels, config))
        self.register_buffer("cosine", angles.cos().float(), persistent=False)
        self.register_buffer("sine", angles.sin().float(), persistent=False)

    @property
    def max_positions(self) -> int:
        """The longest context."""
        return len(self.cosine)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> CosineSine:
        """[S, B] positions to cosines and sines, each [S, B, 1, C/2]."""
        return self.cosine[positions].unsqueeze(2).to(dtype), self.sine[positions].unsqueeze(2).to(dtype)


def rotate(x_SBHC: Tensor, rotary: CosineSine) -> Tensor:
    """Rotates channel pairs (i, i + C/2) by the angle of their position."""
    if torch.compiler.is_compiling():
        return _rotation(x_SBHC, *rotary)
    if torch.is_grad_enabled() and x_SBHC.requires_grad:
        return _Rotate.apply(x_SBHC, *rotary)
    return _apply_rotation(x_SBHC, *rotary)


class _Rotate(torch.autograd.Function):
    """The inverse of a rotation is its transpose, so the backward pass needs only the angles, not the activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _apply_rotation(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _apply_rotation(grad, cosine, -sine), None, None


def _apply_rotation(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = rotated.chunk(2, dim=-1)
    torch.mul(first, cosine, out=left).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=right).addcmul_(first, sine)
    return rotated


def _rotation(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The same without writing into views, for the compiler, which fuses it and finds its derivative."""
    first, second = x.chunk(2, dim=-1)
    left = torch.addcmul(first * cosine, second, sine, value=-1)
    return torch.cat((left, torch.addcmul(second * cosine, first, sine)), dim=-1)


def frequencies(channels: int, config: RopeConfig) -> Tensor:
    """Radians per position [C/2], highest first, float64, including any scaling."""
    # start from integers: inside deepspeed.zero.Init, new floating-point tensors get the training dtype
    base = config.theta ** (-torch.arange(0, channels, 2).double() / channels)
    return base if config.scaling is None else _scale(base, config.scaling)


def _scale(base: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return base / scaling.factor
    # llama3 (Llama 3.1 model card): keep short wavelengths, stretch long ones, interpolate in between.
    rotations = scaling.original_positions * base / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return base * (kept + (1 - kept) / scaling.factor)
