"""Rounding of weights to the dtype of a target."""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype. Raises CheckpointError if a finite number becomes infinite there; `name` is the tensor's."""
    found = value.to(dtype)
    if found.dtype == value.dtype:
        return found
    lost = value.isfinite() & ~found.isfinite()
    if lost.any():
        largest, limit = float(value[lost].abs().max()), torch.finfo(dtype).max
        raise CheckpointError(
            f"{name}: {int(lost.sum()):,} numbers up to {largest:.3g} are beyond {str(dtype).removeprefix('torch.')}, which "
            f"ends at {limit:.3g}; take a --dtype with a larger range: nothing is left at the target"
        )
    return found
