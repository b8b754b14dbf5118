"""Sampling on the GPU: the model's distribution without a seed, the CPU's texts with one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import torch

from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.model import RecycleGPT
from tests.gpu.device import device, rehearsal
from tests.gpu.models import PROMPTS, decode, on_device, tiny

_VOCABULARY, _TRIALS = 4, 600 if rehearsal() else 3000
_STD, _TEMPERATURE = 0.13, 4.0  # no pair of tokens is rare
_CPU = torch.device("cpu")


def _p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float], trials: int) -> float:
    """Of Pearson's chi-squared test."""
    statistic = sum((counts[key] - trials * p) ** 2 / (trials * p) for key, p in expected.items())
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@torch.no_grad()
def _pairs(model: RecycleGPT, prompt: list[int], temperature: float) -> dict[tuple[int, ...], float]:
    """The probability of every pair of tokens after a prompt, by passes without a cache."""

    def after(tokens: list[int]) -> list[float]:
        logits = model.logits(model.hidden_states(torch.tensor([tokens]))[-1:])[0, 0]
        return (logits / temperature).softmax(-1).tolist()

    first = after(prompt)
    second = [after([*prompt, token]) for token in range(_VOCABULARY)]
    return {(a, b): first[a] * second[a][b] for a, b in product(range(_VOCABULARY), repeat=2)}


def test_samples_have_the_distribution_of_the_model() -> None:
    """Prevents random numbers that are correlated or biased on the GPU, and a wrong rule for rejected drafts."""
    prompt = [1, 3, 2]
    expected = _pairs(tiny(_CPU, vocab_size=_VOCABULARY, std=_STD), prompt, _TEMPERATURE)
    assert min(expected.values()) * _TRIALS > 5, "too rare for a chi-squared test"
    engine = local_engine(on_device(vocab_size=_VOCABULARY, std=_STD), max_batch=64)
    for mode in ("autoregressive", "verified"):
        params = SamplingParams(
            temperature=_TEMPERATURE, max_new_tokens=2, draft_tokens=2 if mode == "verified" else None
        )
        found = Counter(decode(engine, [prompt] * _TRIALS, [params] * _TRIALS, mode))
        assert set(found) <= set(expected)
        assert _p_value(found, expected, _TRIALS) > 1e-4, mode


def test_a_seed_gives_the_texts_of_the_cpu() -> None:
    """Prevents noise, top-k, top-p or min-p that depend on the device, the mode or the batch."""
    base = SamplingParams(temperature=0.9, top_k=6, top_p=0.9, min_p=0.02, max_new_tokens=30)
    params = [replace(base, seed=number) for number in range(len(PROMPTS))]
    expected = decode(local_engine(tiny(_CPU), max_batch=8), PROMPTS, params, "autoregressive")
    model = on_device()
    assert next(model.parameters()).device.type == device().type
    for mode in ("autoregressive", "verified"):
        assert decode(local_engine(model, max_batch=8), PROMPTS, params, mode) == expected, mode
        alone = [decode(local_engine(model), [p], [one], mode)[0] for p, one in zip(PROMPTS, params, strict=True)]
        assert alone == expected, f"{mode}, alone"
