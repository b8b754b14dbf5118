"""Verification of a chain of drafts that were drawn at random, without the request's own seed: speculative sampling
(Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318, algorithm 2). The output has the full
model's distribution for any drafts. All other drafts are accepted where they are the token that the full model takes, see
`walk` in tree.py. A pure function of drafts, distributions and counter-based random numbers. Shapes: N drafts, W = N + 1
positions scored by the full call, V token ids of this rank's shard of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.sampling import pick
from recycle_ds.inference.speculation.vocabulary import Vocabulary


@dataclass(frozen=True)
class Verification:
    """Result of one verifying full call: drafts[:accepted] are kept, followed by `token` from the full model."""

    accepted: int
    token: int


def residual(target_V: Tensor, draft_V: Tensor, vocabulary: Vocabulary) -> Tensor:
    """norm(max(p - q, 0)): the distribution that replaces a rejected draft (Leviathan et al., section 2.3).

    If p and q are so close that their difference rounds to zero, returns p, the limit of the exact rule's output.
    """
    excess_V = (target_V - draft_V).clamp_min(0)
    total = vocabulary.sum(excess_V.sum())
    return torch.where(total > 0, excess_V / total, target_V)


def verify_sampled(
    drafts: Sequence[int],
    draft_probs_NV: Tensor | None,
    target_probs_WV: Tensor,
    seed: int,
    index: int,
    vocabulary: Vocabulary,
) -> Verification:
    """Accepts draft i with probability min(1, p_i/q_i), until the first rejection.

    drafts: ids, draft i sampled from draft_probs_NV[i] (None without drafts). target_probs_WV: the full model's
    distribution at each draft's position and after the last. seed and index: of the sequence, and the position of the
    first draft, for the random numbers. The kept tokens are distributed as if sampled one by one from the full model.
    """
    count = len(drafts)
    accepted = 0
    if count:
        assert draft_probs_NV is not None, "drafts cannot be verified without the distributions they were sampled from"
        chosen_N = torch.tensor(drafts, device=target_probs_WV.device)
        p_N = vocabulary.at(target_probs_WV[:count], chosen_N).tolist()
        q_N = vocabulary.at(draft_probs_NV[:count], chosen_N).tolist()
        # u < p/q without the division; u is in [0, 1), so p >= q always accepts and p = 0 never does.
        while (
            accepted < count and noise.uniform(seed, index + accepted, noise.ACCEPTANCE) * q_N[accepted] < p_N[accepted]
        ):
            accepted += 1
    weights_V = target_probs_WV[accepted]
    if accepted < count:
        assert draft_probs_NV is not None
        weights_V = residual(weights_V, draft_probs_NV[accepted], vocabulary)
    return Verification(
        accepted, int(pick(weights_V[None], [noise.key(seed, index + accepted, noise.RESIDUAL)], vocabulary)[0])
    )
