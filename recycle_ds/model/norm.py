"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from recycle_ds.parallel.mesh import Mesh


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32."""

    def __init__(self, width: int, epsilon: float, mesh: Mesh, dtype: torch.dtype, *, of_heads: bool = False) -> None:
        """of_heads: whether each tensor rank normalises its own heads, with the same weight."""
        super().__init__()
        split = mesh.sequence or (of_heads and mesh.tensor.size > 1)
        self.group = mesh.tensor.group if split else None
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.epsilon = epsilon
        self.normalise = normalise
        """`normalise`, or what a compiler made of it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        weight: Tensor = self.weight
        if self.group is not None:
            # a tensor rank has part of the sequence or of the heads: its gradient is a partial sum
            weight = copy_to_tensor_model_parallel_region(weight, self.group)
        return self.normalise(x, weight, self.epsilon)


def normalise(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
