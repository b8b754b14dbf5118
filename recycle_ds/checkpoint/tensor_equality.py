"""Comparison of tensors by their bits and by value. NaN equals NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ValueDifference:
    """How two tensors of the same shape differ."""

    gap: float
    """Largest absolute difference between finite values."""
    not_finite: int
    """Elements with NaN or an infinity that the other tensor does not have at the same position."""


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    integers = _INTEGERS[left.element_size()]
    return torch.equal(left.contiguous().view(integers), right.contiguous().view(integers))


def canonical_nan(value: Tensor) -> Tensor:
    """Replaces every NaN by the same one: which NaN a conversion to another dtype gives is not defined."""
    return value.masked_fill(value.isnan(), math.nan)


def value_difference(left: Tensor, right: Tensor) -> ValueDifference | None:
    """How two tensors of the same shape (dtypes may differ) differ in value; None if they do not. Any NaN equals any other."""
    if same_bits(left, right):
        return None
    left_values, right_values = left.double(), right.double()
    differ = (left_values != right_values) & ~(left_values.isnan() & right_values.isnan())
    if not differ.any():
        return None
    finite = left_values.isfinite() & right_values.isfinite()
    gaps = (left_values - right_values)[differ & finite].abs()
    return ValueDifference(float(gaps.max()) if gaps.numel() else 0.0, int((differ & ~finite).sum()))
