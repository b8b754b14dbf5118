"""All decoding modes on the GPU, compared with one another and with the CPU."""

from __future__ import annotations

import torch

from recycle_ds.inference.bench.diagnosis import first_divergences
from recycle_ds.inference.parameters import SamplingParams
from tests.gpu.models import PROMPTS, on_device, texts, tiny

GREEDY = SamplingParams(max_new_tokens=40, temperature=0.0)
_CPU = torch.device("cpu")


def test_every_mode_gives_the_tokens_of_the_cpu() -> None:
    """Prevents an attention kernel, a cache or a choice of tokens that differs on the GPU, and strides that end decoding."""
    for mode in ("autoregressive", "verified", "alternate"):
        assert texts(on_device(), mode, GREEDY) == texts(tiny(_CPU), mode, GREEDY), mode


def test_verified_is_autoregressive() -> None:
    """Prevents drafts, as chains of every length, that change a token in fp32."""
    expected = texts(on_device(), "autoregressive", GREEDY)
    for drafts in (None, 1, 3, 7):
        params = SamplingParams(max_new_tokens=40, temperature=0.0, draft_tokens=drafts)
        assert texts(on_device(), "verified", params) == expected, f"draft_tokens={drafts}"


def test_bf16_differs_at_near_ties_only() -> None:
    """Prevents verification in bf16 that changes a token which was not a tie within rounding."""
    model = on_device(dtype=torch.bfloat16)
    expected, found = (texts(model, mode, GREEDY) for mode in ("autoregressive", "verified"))
    places = first_divergences(model, PROMPTS, expected, [found])
    assert all(place["gap"] < 0.1 for place in places), places


def test_penalties_and_bans_are_those_of_the_cpu() -> None:
    """Prevents parameters that are computed on another device than the logits."""
    params = SamplingParams(
        max_new_tokens=24, temperature=0.0, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2,
        logit_bias={1: 0.5}, bad_tokens=(2,), min_new_tokens=6, stop_tokens=(5,), logprobs=2,
    )  # fmt: skip
    for mode in ("autoregressive", "verified"):
        assert texts(on_device(), mode, params) == texts(tiny(_CPU), mode, params), mode
