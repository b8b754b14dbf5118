"""What the losses share: a rank's part of the head, its gradient over chunks, and reductions over the tensor axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.parallel.mesh import Axis


@dataclass(frozen=True)
class HeadShard:
    """The rows of the output head on this rank: vocabulary [first, first + rows), of which the first `valid` are not padding.

    scattered: whether this rank has only the states of its part of the sequence (sequence parallelism).
    """

    first: int
    valid: int
    axis: Axis
    scattered: bool = False


class HeadGradient:
    """The head's gradient, summed over chunks. Two or more chunks are summed in fp32, for bf16 weights too."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._sum: Tensor | None = None

    def add(self, error: Tensor, states: Tensor) -> None:
        """Adds error^T states. error: [n, V_local], states: [n, D]."""
        if self._sum is None:
            self._sum = error.t() @ states
        elif error.dtype in (torch.float32, torch.float64):
            self._sum.addmm_(error.t(), states)
        else:
            self._sum = self._sum.float().add_(error.t() @ states)

    def total(self) -> Tensor:
        """[V_local, D] in the weight's dtype."""
        return torch.zeros_like(self._weight) if self._sum is None else self._sum.to(self._weight.dtype)


def global_argmax(peak: Tensor, token: Tensor, axis: Axis) -> Tensor:
    """The lowest token with the highest logit over the tensor axis, the same as argmax on one rank."""
    if axis.size == 1:
        return token
    highest = peak.clone()
    reduce(highest, dist.ReduceOp.MAX, axis)
    candidate = torch.where(peak == highest, token, torch.iinfo(token.dtype).max)
    dist.all_reduce(candidate, op=dist.ReduceOp.MIN, group=axis.group)
    return candidate


def reduce(values: Tensor, operation: dist.ReduceOp.RedOpType, axis: Axis) -> None:
    """Reduces over the axis, in place. Collective."""
    if axis.size > 1:
        dist.all_reduce(values, op=operation, group=axis.group)
