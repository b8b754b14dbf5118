"""Drafts among a part of the vocabulary: cheaper, and never another text."""

from __future__ import annotations

import copy

import pytest
import torch

from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.inference import SamplingParams
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.sequence import Sequence
from recycle_ds.model import RecycleGPT
from tests.unit.inference.engine.requests import check_answers, decode_alone, decode_together, requests
from tests.unit.inference.models import drafts_from_scratch, random_model

DRAFTED = [0, 2, 3, 5]


def drafting_model(ids: list[int], vocabulary: int, seed: int) -> RecycleGPT:
    """A random model that drafts only these tokens."""
    model = copy.copy(random_model(vocabulary, seed, max_positions=96, std=0.3))
    model.draft_ids = torch.tensor(ids)
    return model


@pytest.mark.parametrize("seed", range(2))
def test_answers_do_not_depend_on_the_draft_vocabulary(seed: int) -> None:
    """Prevents token ids and rows of the smaller head from being mixed up, in penalties, biases, noise and verification."""
    model = drafting_model(DRAFTED, 7, seed)
    engine = local_engine(model, max_batch=16, eos_ids=(6,))
    asked = requests(64, vocabulary=7, seed=seed, modes=("verified",))
    found = decode_together(engine, asked)
    check_answers(asked, found, decode_alone(model, asked, eos=6))
    assert sum(sum(one.accepted) for one in found) > 10, "the test needs accepted drafts"


def _run(model: RecycleGPT, params: SamplingParams) -> tuple[Sequence, list[list[int]]]:
    """A finished answer to a prompt, and the drafts after each step."""
    engine = local_engine(model, max_batch=1)
    (sequence,) = engine.add([1, 2, 3], params, "verified")
    drafts = []
    while sequence.ended_at is None:
        engine.step()
        drafts.append(list(sequence.drafts))
    return sequence, drafts


def test_drafts_are_the_likeliest_of_their_vocabulary() -> None:
    """Prevents drafts from outside the vocabulary, and ones that are not the module's best inside it."""
    model = drafting_model(DRAFTED, 7, 1)
    barred = tuple(set(range(7)) - set(DRAFTED))
    engine = local_engine(model, max_batch=1)
    (sequence,) = engine.add([1, 2, 3], SamplingParams(max_new_tokens=30, draft_tokens=3), "verified")
    compared = 0
    while sequence.ended_at is None:
        engine.step()
        assert set(sequence.drafts) <= set(DRAFTED)
        if sequence.drafts:  # only the first one: what follows depends on the whole vocabulary there
            best = drafts_from_scratch(model, sequence.tokens, 1)
            if best[0] in DRAFTED:
                compared += 1
                assert sequence.drafts[0] == best[0]
            else:
                assert best[0] in barred
    assert compared > 5, "the test needs drafts that both heads prefer"


def test_acceptance_is_that_of_the_draft_vocabulary() -> None:
    """Prevents an evaluation that promises an acceptance which drafts from a part of the vocabulary cannot have."""
    tokens_BS = torch.randint(0, 7, (3, 40), generator=torch.Generator().manual_seed(3))
    documents_BS = torch.zeros_like(tokens_BS)
    targets = make_targets(tokens_BS, documents_BS, 1)
    positions_BS = torch.arange(39).expand(3, -1)
    batch = Batch(tokens_BS[:, :-1], positions_BS, documents_BS[:, :-1], targets.inputs, targets.targets)
    model = drafting_model(DRAFTED, 7, 1)
    part = model.evaluate(batch)
    states = model.states(batch)
    best, drafts = (model.logits(state).argmax(-1) for state in states)
    drafts = torch.tensor(DRAFTED)[model.logits(states[1])[..., DRAFTED].argmax(-1)]
    model.draft_ids = None
    full = model.evaluate(batch)
    assert torch.equal(part.loss, full.loss) and torch.equal(part.judged, full.judged)
    valid = (targets.targets[1] >= 0).t()[:-1]
    assert part.agreed[1] == ((drafts[:-1] == best[1:]) & valid).sum() and part.agreed[1] != full.agreed[1]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_request_that_forbids_all_drafts(seed: int | None) -> None:
    """Prevents a distribution that is not a number from being sampled or verified where no draft is allowed."""
    model = drafting_model([0, 2], 7, 1)
    params = SamplingParams(temperature=1.0, seed=seed, allowed_tokens=(1, 4, 5), max_new_tokens=20, draft_tokens=2)
    sequence, drafts = _run(model, params)
    assert set(sequence.tokens[3:]) <= {1, 4, 5} and len(sequence.tokens) == 23
    assert any(drafts) and sequence.confidences == () and sum(sequence.tally.accepted) == 0
