"""What an evaluation counts: losses by depth, and how far the module's drafts agree with the backbone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over a batch, [K+1] each, index 0 the backbone.

    `agreed[k]` counts positions whose drafts agree with the backbone's argmax at depths 1..k, out of the `judged[k]`
    positions that agree at depths 1..k-1 and have a target at depth k."""

    loss: Tensor
    count: Tensor
    agreed: Tensor
    judged: Tensor


def judge(loss: Tensor, targets: Tensor, best: Tensor, counted: Tensor | None = None) -> EvaluationSums:
    """Acceptance from the argmax of every depth. loss: [K+1] sums; targets and best: [K+1, S, B]; counted: bool [K+1, S, B],
    the targets that the losses count, all by default."""
    valid = targets >= 0
    agreed, judged = torch.zeros_like(loss), torch.zeros_like(loss)
    agreeing = torch.ones_like(valid[0])
    for depth in range(1, len(targets)):
        # r^k_t and h_{t+k} both predict x_{t+k+1}
        agreeing = agreeing & valid[depth]
        judged[depth] = agreeing.sum()
        ahead = torch.full_like(best[0], -1)
        ahead[:-depth] = best[0][depth:]
        agreeing = agreeing & (best[depth] == ahead)
        agreed[depth] = agreeing.sum()
    counted = valid if counted is None else counted
    return EvaluationSums(loss, counted.flatten(1).sum(1).float(), agreed, judged)
