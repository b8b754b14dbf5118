"""Verification of draft tokens: pure functions of drafts, distributions and a generator.

Greedy: accepts the longest prefix on which draft and full model agree. Sampled: speculative sampling (Leviathan et al.,
arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318, algorithm 2), whose output has the full model's
distribution for any drafts. Shapes: N drafts, W = N + 1 positions scored by the full call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.inference.speculation.sampling import sample


@dataclass(frozen=True)
class Verification:
    """Result of one verifying full call: drafts[:accepted] are kept, followed by `token` from the full model."""

    accepted: int
    token: int


def verify_greedy(drafts: Sequence[int], targets: Sequence[int]) -> Verification:
    """targets[i]: the full model's choice at the position of drafts[i], plus one more after the last draft."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == targets[accepted]:
        accepted += 1
    return Verification(accepted, targets[accepted])


def residual(target_V: Tensor, draft_V: Tensor) -> Tensor:
    """norm(max(p - q, 0)): the distribution that replaces a rejected draft (Leviathan et al., section 2.3).

    If p and q are so close that their difference rounds to zero, returns p, the limit of the exact rule's output.
    """
    excess_V = (target_V - draft_V).clamp_min(0)
    total = excess_V.sum()
    return torch.where(total > 0, excess_V / total, target_V)


def verify_sampled(
    drafts: Sequence[int], draft_probs_NV: Tensor | None, target_probs_WV: Tensor, generator: torch.Generator | None
) -> Verification:
    """Accepts draft i with probability min(1, p_i/q_i), until the first rejection.

    drafts: ids, draft i sampled from draft_probs_NV[i] (None without drafts). target_probs_WV: the full model's
    distribution at each draft's position and after the last. The kept tokens are distributed as if sampled one by one
    from the full model.
    """
    count = len(drafts)
    if count == 0:
        return Verification(0, int(sample(target_probs_WV[0], generator)))
    assert draft_probs_NV is not None, "drafts cannot be verified without the distributions they were sampled from"
    chosen_N1 = torch.tensor(drafts, device=target_probs_WV.device).unsqueeze(-1)
    p_N = target_probs_WV[:count].gather(-1, chosen_N1).squeeze(-1)
    q_N = draft_probs_NV[:count].gather(-1, chosen_N1).squeeze(-1)
    u_N = torch.rand(count, generator=generator, device=p_N.device, dtype=p_N.dtype)
    # u < p/q without the division; u is in [0, 1), so p >= q always accepts and p = 0 never does.
    accepted = int((u_N * q_N < p_N).long().cumprod(0).sum())
    if accepted == count:
        return Verification(count, int(sample(target_probs_WV[count], generator)))
    return Verification(accepted, int(sample(residual(target_probs_WV[accepted], draft_probs_NV[accepted]), generator)))
