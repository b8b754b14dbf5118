"""Comparing tensors by their bits, so that what is not a number is equal to itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Gap:
    """How two tensors of one shape differ."""

    gap: float
    """The largest difference between numbers."""
    not_finite: int
    """Places with NaN or an infinity that the other tensor does not have there."""


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have one type, one shape and the same bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    integers = _INTEGERS[left.element_size()]
    return torch.equal(left.contiguous().view(integers), right.contiguous().view(integers))


def one_nan(value: Tensor) -> Tensor:
    """The same with one NaN for all: rounding to another type leaves open which one it becomes."""
    return value.masked_fill(value.isnan(), math.nan)


def gap_between(left: Tensor, right: Tensor) -> Gap | None:
    """How two tensors of one shape and of any types differ in value; None where they do not (any NaN equals any)."""
    if same_bits(left, right):
        return None
    mine, theirs = left.double(), right.double()
    differ = (mine != theirs) & ~(mine.isnan() & theirs.isnan())
    if not differ.any():
        return None
    finite = mine.isfinite() & theirs.isfinite()
    numbers = (mine - theirs)[differ & finite].abs()
    return Gap(float(numbers.max()) if numbers.numel() else 0.0, int((differ & ~finite).sum()))
