"""From logits to a distribution: every parameter against a slow reference and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation.sampling import distribution, most_likely, probabilities, sample

PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "repetition_penalty": 1.4},
    {"temperature": 1.0, "repetition_penalty": 0.6},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 0.8},
]


def transformers_probabilities(logits_V: torch.Tensor, params: TokenSampling, history_L: torch.Tensor) -> torch.Tensor:
    """The distribution that `generate` of transformers samples from."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(history_L[None], logits_V[None].clone())[0].softmax(-1)


def slow_probabilities(logits: list[float], params: TokenSampling, history: list[int]) -> list[float]:
    """The definitions, one token at a time, in double precision."""
    penalty = params.repetition_penalty
    for token in set(history):
        logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    logits = [value / params.temperature for value in logits]
    if params.top_k:
        threshold = sorted(logits, reverse=True)[: params.top_k][-1]
        logits = [value if value >= threshold else -math.inf for value in logits]
    probs = _softmax(logits)
    if params.top_p < 1:
        reached, kept = 0.0, set()
        for token in sorted(range(len(probs)), key=lambda i: -probs[i]):
            if reached >= params.top_p:
                break
            kept.add(token)
            reached += probs[token]
        probs = [value if token in kept else 0.0 for token, value in enumerate(probs)]
    threshold = params.min_p * max(probs)
    probs = [value if value >= threshold else 0.0 for value in probs]
    return [value / sum(probs) for value in probs]


def _softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value - max(logits)) for value in logits]
    return [value / sum(powers) for value in powers]


def _case(seed: int, vocabulary: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_V = 3 * torch.randn(vocabulary, generator=generator)
    return logits_V, torch.randint(vocabulary, (25,), generator=generator)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_probabilities_are_those_of_transformers(parameters: dict[str, Any], seed: int) -> None:
    """Prevents a parameter with another meaning or another order than in transformers."""
    logits_V, history_L = _case(seed)
    params = TokenSampling(**parameters)
    expected_V = transformers_probabilities(logits_V, params, history_L)
    torch.testing.assert_close(probabilities(logits_V, params, history_L), expected_V, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_probabilities_follow_the_definitions(parameters: dict[str, Any]) -> None:
    """Prevents an error that this package and transformers share."""
    logits_V, history_L = _case(11)
    params = TokenSampling(**parameters)
    expected = slow_probabilities(logits_V.double().tolist(), params, history_L.tolist())
    found_V = probabilities(logits_V, params, history_L)
    torch.testing.assert_close(found_V, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1.5, 0.5])
def test_temperature_zero_is_the_argmax_after_the_penalty(penalty: float) -> None:
    """Prevents greedy selection without the penalty, or a one-hot distribution that disagrees with the fast path."""
    for seed in range(20):
        logits_V, history_L = _case(seed)
        params = TokenSampling(repetition_penalty=penalty)
        probs_V = probabilities(logits_V, params, history_L)
        reference_V = transformers_probabilities(logits_V, TokenSampling(1.0, repetition_penalty=penalty), history_L)
        assert probs_V.sum() == 1
        assert int(probs_V.argmax()) == int(most_likely(logits_V, params, history_L)) == int(reference_V.argmax())


@pytest.mark.parametrize("parameters", [{}, *PARAMETERS], ids=str)
def test_rows_are_independent(parameters: dict[str, Any]) -> None:
    """Prevents verification, which scores several positions at once, from mixing them."""
    params = TokenSampling(**{**parameters, "repetition_penalty": 1.0})
    rows_WV = torch.stack([_case(seed)[0] for seed in range(4)])
    together_WV = distribution(rows_WV, params)
    for row_V, found_V in zip(rows_WV, together_WV, strict=True):
        torch.testing.assert_close(found_V, distribution(row_V, params))


def test_logits_are_not_modified() -> None:
    """Prevents a parameter that modifies the model's output in place."""
    logits_V, history_L = _case(3)
    before_V = logits_V.clone()
    probabilities(logits_V, TokenSampling(0.7, 5, 0.9, 0.1, 1.3), history_L)
    most_likely(logits_V, TokenSampling(repetition_penalty=1.3), history_L)
    assert torch.equal(logits_V, before_V)


def test_extreme_temperatures_give_finite_probabilities() -> None:
    """Prevents NaN if logits are divided by a tiny or a huge temperature."""
    logits_V, history_L = _case(4)
    for temperature in (1e-4, 1e6):
        probs_V = probabilities(1000 * logits_V, TokenSampling(temperature), history_L)
        assert torch.isfinite(probs_V).all()
        assert math.isclose(float(probs_V.sum()), 1.0, rel_tol=1e-5)


def test_samples_follow_the_probabilities() -> None:
    """Prevents sampling that is biased, or that returns tokens of probability zero."""
    probs_V = torch.tensor([0.5, 0.0, 0.2, 0.3])
    generator = torch.Generator().manual_seed(5)
    counts = torch.bincount(torch.stack([sample(probs_V, generator) for _ in range(4000)]), minlength=4).tolist()
    assert counts[1] == 0
    assert chisquare([counts[0], counts[2], counts[3]], [2000, 800, 1200]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1e-9}, "0 (greedy)"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
    ],
)
def test_values_out_of_range_are_refused(parameters: dict[str, Any], words: str) -> None:
    """Prevents NaN probabilities, or a parameter silently ignored, in place of an error message."""
    with pytest.raises(DecodingError) as caught:
        TokenSampling(**parameters)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
