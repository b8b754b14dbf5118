"""Sampling in the compiled kernels, beside PyTorch's operations."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from recycle_ds.inference.native.choice import sample
from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.adjusting import Position
from recycle_ds.inference.speculation.sampling import choose
from recycle_ds.inference.speculation.vocabulary import Vocabulary
from tests.unit.inference.native.kernels import needs_kernels

RULES = (
    TokenSampling(temperature=1.0),
    TokenSampling(temperature=0.3),
    TokenSampling(temperature=0.7, top_k=50),
    TokenSampling(temperature=0.8, top_p=0.95),
    TokenSampling(temperature=1.3, top_p=0.9, top_k=40, min_p=0.05),
    TokenSampling(temperature=1.0, min_p=0.1),
    TokenSampling(temperature=1.5, top_p=0.5),
    TokenSampling(temperature=2.0, top_k=1),
    TokenSampling(temperature=1.0, top_k=10_000, top_p=0.2),
)


pytestmark = needs_kernels


def _positions(params: list[TokenSampling], start: int) -> list[Position]:
    return [Position(one, 11 + start, start + i, 0) for i, one in enumerate(params)]


def _keys(positions: list[Position]) -> list[int]:
    return [noise.key(one.seed, one.index, noise.TOKEN) for one in positions]


@pytest.mark.parametrize("count", [1, 15, 1000, 5003])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_samples_what_torch_samples(count: int, spread: float) -> None:
    """A seed gave another text with the kernels than without: another rule, random number or tie."""
    generator = torch.Generator().manual_seed(count)
    vocabulary = Vocabulary(7, count)
    for start in range(0, 40, 4):
        params = [RULES[(start + i) % len(RULES)] for i in range(9)]
        logits = spread * torch.randn(9, count, generator=generator)
        if start % 8 == 0 and count > 20:
            logits[:, 3:17] = -math.inf
        positions = _positions(params, start)
        expected, _ = choose(logits, positions, vocabulary)
        assert sample(logits, params, _keys(positions), 7) == expected.tolist()


def test_a_row_depends_on_nothing_but_itself() -> None:
    """A text changed with the number of rows of a step, or with the number of threads."""
    logits = 3 * torch.randn(13, 4099, generator=torch.Generator().manual_seed(1))
    params = [RULES[i % len(RULES)] for i in range(13)]
    keys = _keys(_positions(params, 5))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sample(logits, params, keys))
            found.append([sample(logits[i : i + 1], params[i : i + 1], keys[i : i + 1])[0] for i in range(13)])
    finally:
        torch.set_num_threads(before)
    assert all(one == found[0] for one in found)
    assert len(set(found[0])) > 5


def test_has_the_distribution() -> None:
    """Random numbers or logarithms were biased: frequencies of 20,000 tokens beside the exact probabilities."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf, 1.5, 0.2]])
    params, draws = TokenSampling(temperature=0.8), 20_000
    keys = [noise.key(3, index, noise.TOKEN) for index in range(draws)]
    counts = Counter(sample(logits.expand(draws, -1), [params] * draws, keys))
    expected = draws * (logits[0] / 0.8).softmax(0)
    kept = [i for i in range(7) if expected[i] > 0]
    assert counts[4] == 0
    statistic = sum((counts[i] - float(expected[i])) ** 2 / float(expected[i]) for i in kept)
    assert statistic < 20.5, "chi-squared with 5 degrees of freedom, 0.1 %"
    wrong = draws * logits[0].softmax(0)
    assert sum((counts[i] - float(wrong[i])) ** 2 / float(wrong[i]) for i in kept) > 20.5


def test_nothing_to_choose() -> None:
    """A row without a token that may be chosen gave an id that is forbidden."""
    logits = torch.full((2, 40), -math.inf)
    logits[1, 8] = 0.0
    params = [TokenSampling(temperature=1.0, top_p=0.9)] * 2
    assert sample(logits, params, [1, 2]) == [-1, 8]


def test_top_p_counts_only_what_top_k_keeps() -> None:
    """With exactly k tokens near the highest one, the mass that top-k removed counted for top-p: a token outside was drawn."""
    logits = torch.full((1, 4000), -13.0)
    logits[0, :4] = torch.tensor([0.0, -0.7, -1.8, -3.0])
    params = TokenSampling(temperature=1.0, top_k=4, top_p=0.86)
    keys = [noise.key(2, index, noise.TOKEN) for index in range(300)]
    assert set(sample(logits.expand(300, -1), [params] * 300, keys)) == {0, 1}
