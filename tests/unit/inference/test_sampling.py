"""From logits to a distribution: every parameter against a slow reference and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest
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
from recycle_ds.inference.speculation import adjusting, noise, sampling
from recycle_ds.inference.speculation.adjusting import Adjuster, Position
from recycle_ds.inference.speculation.sampling import choose, pick
from recycle_ds.inference.speculation.vocabulary import Vocabulary
from tests.unit.inference.models import probabilities

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
        assert int(probs_V.argmax()) == most_likely(logits_V, params, history_L) == int(reference_V.argmax())


def test_rows_are_independent() -> None:
    """Prevents a batch, whose rows have different parameters and are computed together, from mixing them."""
    cases = [({}, *_case(100)), *((parameters, *_case(seed)) for seed, parameters in enumerate(PARAMETERS))]
    params = [TokenSampling(**parameters) for parameters, _, _ in cases]
    vocabulary = Vocabulary(0, 60)
    histories = [history_L for _, _, history_L in cases]
    positions = [
        Position(one, seed, 25, 25, history=lambda history_L=history_L: history_L)
        for seed, (one, history_L) in enumerate(zip(params, histories, strict=True))
    ]
    logits_RV = Adjuster(vocabulary).adjust(torch.stack([logits_V for _, logits_V, _ in cases]), positions)
    together_RV = sampling.probabilities(logits_RV, params, vocabulary)
    chosen_R, _ = choose(logits_RV, positions, vocabulary)
    for row, (_, logits_V, history_L) in enumerate(cases):
        torch.testing.assert_close(together_RV[row], probabilities(logits_V, params[row], history_L))
        alone_R, _ = choose(logits_RV[row : row + 1], positions[row : row + 1], vocabulary)
        assert int(alone_R) == int(chosen_R[row])


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.99, 0.99999])
def test_a_nucleus_larger_than_the_candidates_is_exact(top_p: float) -> None:
    """Prevents a nucleus that is cut off at the few most likely tokens that are looked at first."""
    logits_V = 0.1 * torch.randn(3000, generator=torch.Generator().manual_seed(1))
    params = TokenSampling(1.0, top_p=top_p)
    expected_V = transformers_probabilities(logits_V, params, torch.zeros(0, dtype=torch.int64))
    found_V = probabilities(logits_V, params, torch.zeros(0, dtype=torch.int64))
    assert ((found_V > 0) != (expected_V > 0)).sum() <= 1, "the sums are rounded differently"
    assert int((found_V > 0).sum()) > sampling._CANDIDATES


@pytest.mark.parametrize("ranks", [2, 3])
def test_noise_and_numbers_do_not_depend_on_the_shard(ranks: int) -> None:
    """Prevents a sampled text that changes with the tensor-parallel degree."""
    keys_R = torch.tensor([noise.key(5, position, noise.TOKEN) for position in range(4)])
    full_RV = noise.exponentials(keys_R, torch.arange(60))
    parts = [noise.exponentials(keys_R, torch.arange(60 // ranks) + 60 // ranks * rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts, -1), full_RV)


def test_noise_is_exponential_and_independent() -> None:
    """Prevents noise with another distribution, or that repeats over positions, purposes, seeds or tokens."""
    keys = [noise.key(seed, position, purpose) for seed in (0, 1) for position in range(40) for purpose in range(4)]
    assert len(set(keys)) == len(keys)
    values_RV = noise.exponentials(torch.tensor(keys), torch.arange(200))
    assert kstest(values_RV.flatten().numpy(), "expon").pvalue > 1e-4
    assert len(values_RV.unique()) > 0.99 * values_RV.numel()
    for shifted in (values_RV.roll(1, 0), values_RV.roll(1, 1), values_RV.roll(4, 0)):
        assert abs(float(torch.corrcoef(torch.stack((values_RV.flatten(), shifted.flatten())))[0, 1])) < 0.02
    uniforms = [noise.uniform(3, position, noise.ACCEPTANCE) for position in range(2000)]
    assert kstest(uniforms, "uniform").pvalue > 1e-4


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"presence_penalty": 0.5}, [1.0, 1.5, 2.5, 4.0]),
        ({"frequency_penalty": 0.5}, [1.0, 1.5, 2.0, 4.0]),
        ({"presence_penalty": 1.0, "frequency_penalty": -0.5}, [1.0, 1.5, 3.0, 4.0]),
        ({"logit_bias": {0: 5.0, 3: -1.0}}, [6.0, 2.0, 3.0, 3.0]),
        ({"bad_tokens": (3,)}, [1.0, 2.0, 3.0, -math.inf]),
        ({"allowed_tokens": (0, 2), "bad_tokens": (2,)}, [1.0, -math.inf, -math.inf, -math.inf]),
        ({"min_new_tokens": 4}, [1.0, -math.inf, 3.0, 4.0]),
        ({"min_new_tokens": 3}, [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_adjustments_follow_the_definitions(parameters: dict[str, Any], expected: list[float]) -> None:
    """Prevents penalties that count the prompt, a bias or a forbidden token that is ignored, an end that comes too
    early."""
    history_L = torch.tensor([0, 3, 1, 2, 2])  # a prompt of two tokens, and three new ones
    position = Position(TokenSampling(**parameters), 0, 5, 3, end_ids=(1,), history=lambda: history_L)
    found_1V = Adjuster(Vocabulary(0, 4)).adjust(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), [position])
    assert found_1V.tolist() == [expected]


def most_likely(logits_V: torch.Tensor, params: TokenSampling, history_L: torch.Tensor) -> int:
    position = Position(params, 0, len(history_L), len(history_L), history=lambda: history_L)
    vocabulary = Vocabulary(0, len(logits_V))
    chosen_R, probs_RV = choose(Adjuster(vocabulary).adjust(logits_V[None], [position]), [position], vocabulary)
    assert probs_RV is None
    return int(chosen_R)


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
    keys = [noise.key(5, position, noise.TOKEN) for position in range(4000)]
    counts = torch.bincount(pick(probs_V.expand(4000, 4), keys, Vocabulary(0, 4)), minlength=4).tolist()
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
        ({"presence_penalty": math.nan}, "presence_penalty=nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty=inf"),
        ({"logit_bias": {3: -math.inf}}, "bad_tokens forbids"),
        ({"allowed_tokens": (1,), "bad_tokens": (1,)}, "none is left"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"logprobs": 101}, "logprobs=101"),
        ({"seed": 2**63}, "seed="),
    ],
)
def test_values_out_of_range_are_refused(parameters: dict[str, Any], words: str) -> None:
    """Prevents NaN probabilities, or a parameter silently ignored, in place of an error message."""
    with pytest.raises(DecodingError) as caught:
        TokenSampling(**parameters)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_amendments_are_those_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the bias of a request that has ended from being applied to one that lies at the same place in memory, and more
    tensors from being kept than for the latest requests."""
    vocabulary, logits_1V = Vocabulary(0, 9), torch.zeros(1, 9)
    adjuster = Adjuster(vocabulary)
    for number in range(600):
        params = TokenSampling(logit_bias=((number % 9, 1.0 + number),), bad_tokens=((number + 1) % 9,))
        position = Position(params, 0, 1, 0)
        for _ in range(2):
            found_V = adjuster.adjust(logits_1V, [position])[0]
            assert found_V.argmax() == number % 9 and found_V.max() == 1.0 + number
            assert found_V.isinf().nonzero().flatten().tolist() == [(number + 1) % 9]
        assert not logits_1V.any()
    assert len(adjuster._known) == 600 and adjuster._kept == 600 * (1 + 2 + 9)
    monkeypatch.setattr(adjusting, "_MOST_KEPT", 100)
    adjuster.adjust(logits_1V, [Position(TokenSampling(bad_tokens=(1,)), 0, 1, 0)])
    assert adjuster._kept == sum(found.size for _, found in adjuster._known.values()) <= 100
