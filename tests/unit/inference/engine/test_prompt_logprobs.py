"""Log probabilities of prompts: those of one pass over the prompt, however it is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recycle_ds.inference import DecodingError, SamplingParams
from recycle_ds.inference.engine.build import local_engine
from tests.unit.inference.engine.requests import memory_of
from tests.unit.inference.models import random_model

MODEL = random_model(7, 1, max_positions=96, std=0.3)
SCORED = SamplingParams(max_new_tokens=6, logprobs=2, prompt_logprobs=True)


def prompt_of(length: int) -> list[int]:
    return torch.randint(0, 7, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.no_grad()
def expected(prompt: list[int]) -> torch.Tensor:
    """Log probabilities [T - 1, V] after each token of a prompt but the last, in one pass."""
    return MODEL.logits(MODEL.hidden_states(torch.tensor([prompt])))[:-1, 0].log_softmax(-1)


@pytest.mark.parametrize("mode", ["autoregressive", "verified"])
def test_prompts_are_scored_in_chunks_beside_others_and_after_preemption(mode: str) -> None:
    """Prevents scores that are missing, shifted or doubled at chunks of a prompt, at known prefixes, at forks of one prompt,
    or when memory was taken, and a text that changes because its prompt is scored."""
    engine = local_engine(MODEL, max_batch=4, kv_memory_gib=memory_of(MODEL, 8))
    engine.scheduler.chunk = 7
    prompts = [prompt_of(length) for length in (1, 2, 7, 8, 40, 40, 60)]
    sequences = [engine.add(prompt, replace(SCORED, n=1 + number % 2), mode) for number, prompt in enumerate(prompts)]
    plain = [engine.add(prompt, replace(SCORED, prompt_logprobs=False), mode) for prompt in prompts]
    while engine.unfinished:
        engine.step()
        engine.scheduler.check()
        if engine.scheduler.step in (12, 20, 30, 40):  # takes memory of others while they read their prompts
            engine.add(prompt_of(80), SamplingParams(max_new_tokens=2), mode, priority=9)
    assert engine.scheduler.preemptions > 0
    for prompt, answers, others in zip(prompts, sequences, plain, strict=True):
        found = answers[0].generation(0.0)
        assert found.token_ids == others[0].generation(0.0).token_ids
        assert len(found.logprobs) == len(found.token_ids)
        assert len(found.prompt_logprobs) == len(prompt) - 1
        assert all(one.generation(0.0).prompt_logprobs == () for one in (*answers[1:], *others))
        for row, token, (value, best) in zip(expected(prompt), prompt[1:], found.prompt_logprobs, strict=True):
            assert value == pytest.approx(float(row[token]), abs=1e-4)
            assert [one for one, _ in best] == row.topk(2).indices.tolist()


def test_prompt_scores_need_logprobs() -> None:
    """Prevents a request that silently returns none."""
    with pytest.raises(DecodingError, match="prompt_logprobs: needs logprobs"):
        SamplingParams(prompt_logprobs=True)
