"""A chunk's losses and the gradients of its logits as pure functions of the logits, for torch.compile.

The functions of `cross_entropy` and `objectives` work in place, step by step, which is best without a compiler: each step
reads and writes the chunk's logits in fp32, some 46 bytes per logit in bf16 training. Here a compiler makes one kernel that
reads the logits as the product wrote them and writes their gradient in the same dtype, with everything between in registers:
6 to 8 bytes. Without a compiler these functions would take more memory than the others, so they are only used compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recycle_ds.data.targets import IGNORE
from recycle_ds.model.losses.objectives import OBJECTIVES, Expected
from recycle_ds.parallel.mesh import Axis


@dataclass(frozen=True)
class FusedLosses:
    """The functions of this file, compiled. For heads that are not split over tensor ranks."""

    cross_entropy: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    compare: Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

    @staticmethod
    def compiled(compiler: Callable[[Callable[..., Any]], Any]) -> FusedLosses:
        """compiler: returns a compiled function."""
        return FusedLosses(compiler(cross_entropy_and_error), compiler(comparison_and_error))


def cross_entropy_and_error(logits: Tensor, targets: Tensor, weight: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """The cross entropy of each row [n], fp32, 0 without a target, and the gradient of its weighted sum with respect to the
    logits [n, V] in their dtype.

    logits: [n, V], of which the first `valid` columns are not padding. targets: [n], IGNORE for rows without one. weight: a
    scalar, or [n].
    """
    ignored = targets == IGNORE
    column = targets.clamp_min(0)[:, None]
    values = logits.float()
    columns = torch.arange(logits.shape[1], device=logits.device)
    if valid < logits.shape[1]:
        values = values.masked_fill(columns >= valid, -torch.inf)
    logsumexp = values.logsumexp(dim=1)
    loss = (logsumexp - values.gather(1, column).squeeze(1)).masked_fill(ignored, 0.0)
    # compared instead of scattered: a scatter would need the probabilities in memory
    error = (values - logsumexp[:, None]).exp() - (columns == column).float()
    scale = (weight * torch.ones_like(loss)).masked_fill(ignored, 0.0)
    return loss, (error * scale[:, None]).to(logits.dtype)


def comparison_and_error(objective: str, logits: Tensor, probs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same for an objective that compares with the backbone's probabilities [n, V]. weight: [n]."""
    none = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    # the objectives work in place: on a copy, which a compiler never makes
    loss, error = OBJECTIVES[objective](logits.float().clone(), Expected(probs, none, none.bool()), Axis())
    return loss, (error * weight[:, None]).to(logits.dtype)
