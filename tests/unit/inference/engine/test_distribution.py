"""Sampling in a batch without a seed: speculative sampling keeps the model's joint distribution."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from recycle_ds.inference.engine import runner
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.parameters import SamplingParams, TokenSampling
from recycle_ds.inference.speculation.verification import Verification
from tests.unit.inference.models import agreement, joint_distribution, random_model

TRIALS, COUNT = 900, 4


def _p_value(monkeypatch: pytest.MonkeyPatch, draft_ids: list[int] | None = None) -> float:
    """Chi-squared p-value of many sampled continuations, decoded sixteen at a time with different numbers of drafts."""
    seeds = iter(range(TRIALS))
    monkeypatch.setattr("recycle_ds.inference.engine.engine.secrets.randbelow", lambda _: next(seeds))
    model = copy.copy(random_model(3, 0, layers=1, std=0.2))
    model.draft_ids = None if draft_ids is None else torch.tensor(draft_ids)
    engine = local_engine(model, max_batch=16)
    answers = []
    for trial in range(TRIALS):
        params = SamplingParams(
            0.9, top_p=0.95, repetition_penalty=1.2, max_new_tokens=COUNT, draft_tokens=1 + trial % 3
        )
        answers += engine.add([1], params, "verified")
    engine.finish(answers)
    assert sum(sum(one.tally.accepted) for one in answers) > TRIALS / 2, "the test needs accepted drafts"
    counts = Counter(tuple(one.tokens[1:]) for one in answers)
    params = TokenSampling(0.9, top_p=0.95, repetition_penalty=1.2)
    return agreement(counts, joint_distribution(model, [1], params, COUNT))


def test_a_batch_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents drafts, of different numbers for each sequence of a batch, from changing what is sampled."""
    assert _p_value(monkeypatch) > 1e-4


def test_a_draft_vocabulary_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents drafts of a part of the vocabulary from being verified against another distribution than their own."""
    assert _p_value(monkeypatch, [0, 2]) > 1e-4


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a test too weak to detect drafts that are all accepted."""
    rule = runner.verify_sampled

    def accept_all(drafts: Any, q: Any, p: Any, *rest: Any) -> Verification:
        found = rule(drafts, q, p, *rest)
        return Verification(len(drafts), found.token)

    monkeypatch.setattr(runner, "verify_sampled", accept_all)
    assert _p_value(monkeypatch) < 1e-4
