"""Simulated decoding in evaluations against the engine's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.evaluation.perplexity import _batch, evaluate_documents
from recycle_ds.inference import Decoder, Generation
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.acceptance import simulate
from tests.unit.inference.models import overfitted_model, spread_added

EOS = 6


def generations(model: RecycleGPT, drafts: int, count: int) -> tuple[list[Generation], list[list[int]]]:
    """Greedy answers to prompts of one token with a fixed number of drafts, and the texts without the final EOS."""
    found, texts = [], []
    for first in range(6):
        answer = Decoder(model, EOS).generate([first], "verified", max_new_tokens=count, draft_tokens=drafts)
        tokens = [first, *answer.token_ids]
        found.append(answer)
        texts.append(tokens[:-1] if tokens[-1] == EOS else tokens)
    return found, texts


@pytest.mark.parametrize("parts", [{}, {"taps": (0, 1), "confidence": True}], ids=["plain", "parts"])
@pytest.mark.parametrize("drafts", [1, 3])
def test_equals_what_the_engine_gets(drafts: int, parts: Any) -> None:
    """Prevents a figure during training that decoding with the same drafts does not reach."""
    config = ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=7, max_positions=96, init_std=0.3)
    accepted = 0
    for seed in range(3):
        model = spread_added(build_model(config, RecycleConfig(layers=1, depth=drafts, **parts), seed=seed).eval())
        answers, texts = generations(model, drafts, 40)
        tokens = sum(len(answer.token_ids) - 1 for answer in answers)
        calls = sum(answer.full_calls - 1 for answer in answers)
        # one by one, since a text of fewer than 40 tokens ends with EOS and the others do not
        found = [_cycles(model, text, ended=len(text) < 41) for text in texts]
        assert (sum(one[0] for one in found), sum(one[1] for one in found)) == (tokens, calls)
        accepted += sum(sum(answer.accepted) for answer in answers)
    assert accepted > 20, "the test needs accepted drafts"


def _cycles(model: RecycleGPT, text: list[int], ended: bool) -> tuple[int, int]:
    """Tokens and calls of the simulation on one text."""
    tokens = [*text, EOS] if ended else text
    sums = model.evaluate(_batch([(tokens, [0] * len(tokens))], model.depth))
    return int(sums.cycles[0]), int(sums.cycles[1])


def test_an_overfitted_model_takes_all_drafts() -> None:
    """Prevents a simulation that counts less than a full chain where every draft is accepted, or more."""
    text = [0, 3, 1, 4, 2, 5, 1, 0, 4, 3]
    model = overfitted_model(text, 7, depth=3)
    result = evaluate_documents(model, [text * 4 + text[:1]], 0, 128, 1)
    assert result.acceptance == [1.0, 1.0, 1.0]
    assert result.tokens_per_full_call == pytest.approx(40 / 10)


def test_documents_and_ends() -> None:
    """Prevents cycles across documents, and tokens beyond the end of a text."""
    drafts = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool).t()  # documents of 5, 4 and 1 tokens
    every = torch.tensor([[3, 2, 1, 0, 2, 1, 0, 0]]).t()
    assert simulate(every, drafts) == (3 + 2, 2)
    assert simulate(torch.zeros_like(every), drafts) == (3 + 2, 5)
    one = torch.tensor([[1, 1, 1, 0, 0, 1, 0, 0]]).t()
    assert simulate(one, drafts) == (3 + 2, 2 + 2)
