"""Verification of drafts: greedy on examples, sampled with a chi-squared test that detects wrong rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from recycle_ds.inference.speculation import noise, verification
from recycle_ds.inference.speculation.sampling import pick
from recycle_ds.inference.speculation.tree import walk
from recycle_ds.inference.speculation.verification import Verification
from recycle_ds.inference.speculation.vocabulary import Vocabulary

# Two positions over three tokens. Drafts are sampled from Q, and kept tokens must be distributed as P. The second
# position's distributions do not depend on the first token, so the joint distribution of two tokens is a product.
P = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
Q = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.5, 0.0]])
TRIALS = 4_000

VOCABULARY = Vocabulary(0, 3)

Verify = Callable[[list[int], Tensor | None, Tensor, int], Verification]


def sample(probs_V: Tensor, seed: int, index: int, purpose: int = noise.DRAFT) -> int:
    return int(pick(probs_V[None], [noise.key(seed, index, purpose)], VOCABULARY)[0])


def drafts_of(probs_NV: Tensor, seed: int) -> list[int]:
    return [sample(row, seed, index) for index, row in enumerate(probs_NV)]


def verify_sampled(drafts: list[int], draft_NV: Tensor | None, target_WV: Tensor, seed: int) -> Verification:
    return verification.verify_sampled(drafts, draft_NV, target_WV, seed, 0, VOCABULARY)


def residual(target_V: Tensor, draft_V: Tensor) -> Tensor:
    return verification.residual(target_V, draft_V, VOCABULARY)


@pytest.mark.parametrize(
    ("drafts", "targets", "verification"),
    [
        ([], [7], Verification(0, 7)),
        ([3], [3, 8], Verification(1, 8)),
        ([3], [4, 8], Verification(0, 4)),
        ([1, 2, 3], [1, 2, 3, 4], Verification(3, 4)),
        ([1, 2, 3], [1, 9, 3, 4], Verification(1, 9)),
        ([1, 2, 3], [0, 2, 3, 4], Verification(0, 0)),
    ],
)
def test_greedy_keeps_the_longest_agreeing_prefix(
    drafts: list[int], targets: list[int], verification: Verification
) -> None:
    """Prevents a draft kept after a rejected one, and a bonus token taken from the wrong position."""
    path = walk(drafts, (), targets)
    assert path == list(range(1, len(path) + 1))
    assert Verification(len(path), targets[len(path)]) == verification


def _p_value(verify: Verify, seed: int = 0) -> float:
    """Chi-squared p-value of the first two kept tokens against P. If only one is kept, the second is sampled from P."""
    counts: Counter[tuple[int, int]] = Counter()
    for trial in range(seed, seed + TRIALS):
        drafts = drafts_of(Q, trial)
        found = verify(drafts, Q, P, trial)
        kept = [*drafts[: found.accepted], found.token]
        if len(kept) == 1:
            kept.append(sample(P[1], trial, 1, noise.TOKEN))
        counts[kept[0], kept[1]] += 1
    cells = list(product(range(3), repeat=2))
    expected = [TRIALS * float(P[0, first] * P[1, second]) for first, second in cells]
    return float(chisquare([counts[cell] for cell in cells], expected, sum_check=False).pvalue)


def test_sampled_tokens_have_the_full_models_distribution() -> None:
    """Prevents speculative sampling that is not lossless above temperature 0."""
    assert _p_value(verify_sampled) > 1e-4


def test_the_bonus_token_has_the_full_models_distribution() -> None:
    """Prevents a token after fully accepted drafts that is sampled from the wrong position."""
    counts: Counter[int] = Counter()
    trial = 0
    while counts.total() < 600:
        trial += 1
        found = verify_sampled(drafts_of(Q, trial), Q, P, trial)
        if found.accepted == 2:
            counts[found.token] += 1
    assert chisquare([counts[i] for i in range(3)], (600 * P[2].double() / P[2].double().sum()).tolist()).pvalue > 1e-4


def _always_accepting(drafts: list[int], draft_NV: Tensor | None, target_WV: Tensor, seed: int) -> Verification:
    return Verification(len(drafts), sample(target_WV[len(drafts)], seed, len(drafts), noise.RESIDUAL))


def _without_residual(drafts: list[int], draft_NV: Tensor | None, target_WV: Tensor, seed: int) -> Verification:
    accepted = verify_sampled(drafts, draft_NV, target_WV, seed).accepted
    return Verification(accepted, sample(target_WV[accepted], seed, accepted, noise.RESIDUAL))


def _with_rows_mixed_up(drafts: list[int], draft_NV: Tensor | None, target_WV: Tensor, seed: int) -> Verification:
    assert draft_NV is not None
    return verify_sampled(drafts, draft_NV.roll(1, 0), target_WV, seed)


@pytest.mark.parametrize("wrong", [_always_accepting, _without_residual, _with_rows_mixed_up])
def test_a_wrong_rule_fails_the_test(wrong: Verify) -> None:
    """Prevents a chi-squared test too weak to detect a wrong rule."""
    assert _p_value(wrong) < 1e-4


def test_without_drafts_the_token_is_drawn_from_the_full_model() -> None:
    """Prevents a cycle without drafts from being treated as one with rejected drafts."""
    counts = Counter(verify_sampled([], None, P[:1], seed).token for seed in range(2000))
    assert chisquare([counts[i] for i in range(3)], (2000 * P[0].double() / P[0].double().sum()).tolist()).pvalue > 1e-4


def test_equal_distributions_always_accept() -> None:
    """Prevents rejections by rounding if draft and full model agree."""
    for seed in range(300):
        assert verify_sampled(drafts_of(P[:2], seed), P[:2], P, seed).accepted == 2


def test_impossible_drafts_are_never_accepted() -> None:
    """Prevents a token that the full model excludes (top-k, min-p) from being accepted as a draft."""
    target_WV = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    draft_NV = torch.tensor([[1.0, 0.0, 0.0]])
    for seed in range(300):
        assert verify_sampled([0], draft_NV, target_WV, seed) == Verification(0, 1)


def test_a_residual_lost_to_rounding_is_the_full_models_distribution() -> None:
    """Prevents 0/0, and a crash of the sampling, if p and q differ by less than the rounding error."""
    p_V = torch.tensor([0.25, 0.75])
    assert torch.equal(residual(p_V, p_V), p_V)
    assert torch.equal(residual(p_V, torch.tensor([0.5, 0.8])), p_V)  # sums above 1 by (exaggerated) rounding
    torch.testing.assert_close(residual(p_V, torch.tensor([0.75, 0.25])), torch.tensor([0.0, 1.0]))
