"""Acceptance of the module's drafts: how far they agree with the backbone, from the likeliest token of every depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over a batch, [K+1] each, index 0 the backbone.

    `agreed[k]` counts positions whose drafts agree with the backbone's argmax at depths 1..k, out of the `judged[k]`
    positions that agree at depths 1..k-1 and have a target at depth k. `cycles`: see `simulate`."""

    loss: Tensor
    count: Tensor
    agreed: Tensor
    judged: Tensor
    cycles: Tensor

    def stacked(self) -> Tensor:
        """All of them as [SUMS, K+1] float64."""
        return torch.stack((self.loss, self.count, self.agreed, self.judged, self.cycles)).double()


SUMS = 5
"""Rows of `EvaluationSums.stacked`."""


@dataclass(frozen=True)
class EvaluationResult:
    """Mean losses (nats per token) and acceptance by depth, conditional on all earlier depths having agreed; tokens that a call
    of the backbone yields (see `simulate`), None without a module."""

    loss: float
    recycle_loss: list[float]
    acceptance: list[float]
    tokens_per_full_call: float | None

    @staticmethod
    def of(totals: Tensor) -> EvaluationResult:
        """From the summed rows of `EvaluationSums.stacked`."""
        loss, count, agreed, judged, cycles = totals
        means = (loss / count.clamp_min(1)).tolist()
        acceptance = (agreed / judged.clamp_min(1)).tolist()
        tokens, calls = cycles.tolist()[:2] if len(cycles) > 1 else (0.0, 0.0)
        return EvaluationResult(means[0], means[1:], acceptance[1:], tokens / calls if calls else None)


def judge(loss: Tensor, targets: Tensor, best: Tensor, counted: Tensor | None = None) -> EvaluationSums:
    """Acceptance from the argmax of every depth. loss: [K+1] sums; targets and best: [K+1, S, B]; counted: bool [K+1, S, B],
    the targets that the losses count, all by default."""
    valid = targets >= 0
    agreed, judged = torch.zeros_like(loss), torch.zeros_like(loss)
    agreeing = torch.ones_like(valid[0])
    accepted = torch.zeros_like(best[0])
    cycles = torch.zeros_like(loss)
    for depth in range(1, len(targets)):
        # r^k_t and h_{t+k} both predict x_{t+k+1}
        agreeing = agreeing & valid[depth]
        judged[depth] = agreeing.sum()
        ahead = torch.full_like(best[0], -1)
        ahead[:-depth] = best[0][depth:]
        agreeing = agreeing & (best[depth] == ahead)
        agreed[depth] = agreeing.sum()
        accepted += agreeing
    if len(targets) > 1:
        cycles[:2] = torch.tensor(simulate(accepted, valid[1]))
    counted = valid if counted is None else counted
    return EvaluationSums(loss, counted.flatten(1).sum(1).float(), agreed, judged, cycles)


def simulate(accepted_SB: Tensor, drafts_SB: Tensor) -> tuple[int, int]:
    """Tokens and calls of the backbone if the rows' documents were decoded in chains of K drafts. Synchronises the device.

    accepted_SB: from each position t, how many of the drafts r^1_t, r^2_t, ... the backbone agrees with before it first does
    not. drafts_SB: bool, whether x_{t+2} is in the document of x_t.

    The cycle that starts at t has x_{t+1} as its latest token; its call yields the accepted drafts and one token of the
    backbone's own, which is not counted beyond the document's end. The next cycle starts after them. On the backbone's own
    greedy text these are the calls of `verified` at temperature 0 with K drafts for a prompt of one token, except for the
    prefill, which yields the first token.
    """
    accepted, drafts = accepted_SB.cpu().numpy(), drafts_SB.cpu().numpy()
    length, rows = drafts.shape
    at, column = np.zeros(rows, dtype=np.int64), np.arange(rows)
    tokens = calls = 0
    while len(column):
        begins, count = drafts[at, column], accepted[at, column]
        last = at + count
        own = (last < length) & drafts[np.minimum(last, length - 1), column]
        calls += int(begins.sum())
        tokens += int(((count + own) * begins).sum())
        at = at + np.where(begins, count + 1, 1)
        at, column = at[at < length], column[at < length]
    return tokens, calls
