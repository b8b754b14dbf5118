"""Steps that are planned, and started, before the outcome of the one before is known: the same answers, nothing lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.device.buffers import Outbox
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.plan import PENDING
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.speculation.cost_model import CostModel
from tests.unit.inference.engine.device.watched import Watched
from tests.unit.inference.engine.requests import (
    FixedCosts,
    check_answers,
    decode_alone,
    decode_together,
    memory_of,
    requests,
)
from tests.unit.inference.models import random_model


def _hopeless(engine: DecodingEngine) -> None:
    """Lets `verified` make no drafts: every further token costs as much as a whole call."""
    engine.use_costs(FixedCosts(((1, 1.0), (64, 64.0)), ((1, 10.0),)))


@pytest.mark.parametrize(("seed", "batch", "blocks"), [(0, 16, None), (1, 5, 8), (2, 1, None)])
def test_no_answer_depends_on_it(seed: int, batch: int, blocks: int | None) -> None:
    """Prevents a token that is lost, doubled or read before it is written, a plan for a sequence that has ended or is
    preempted, penalties that miss the latest token, and blocks that are not given back."""
    model = random_model(7, seed, max_positions=96, std=0.3)
    memory = None if blocks is None else memory_of(model, blocks)
    engine = local_engine(model, max_batch=batch, kv_memory_gib=memory, eos_ids=(6,), compiled=False, steps="static")
    _hopeless(engine)
    watched = Watched(engine)
    modes = ("autoregressive", "autoregressive", "verified")
    asked = requests(40, vocabulary=7, seed=seed, modes=modes) + requests(6, vocabulary=7, seed=seed + 9)
    plain = {"draft_tokens": None, "logprobs": None, "prompt_logprobs": False}  # else few plans can be made ahead
    asked = [replace(one, params=replace(one.params, **plain)) if one.mode in modes else one for one in asked]
    found = decode_together(engine, asked)
    check_answers(asked, found, decode_alone(model, asked, eos=6))
    assert watched.ahead > 20, "the test needs plans that are made ahead"
    assert watched.most == 2
    assert blocks is None or engine.scheduler.preemptions > 0, "the test needs preemptions"
    assert watched.collected == len(watched.plans) and not engine.unfinished
    assert engine.scheduler.pool.free == engine.scheduler.pool.count


@pytest.mark.parametrize("with_module", [True, False])
def test_a_single_stream_is_always_a_step_ahead(with_module: bool) -> None:
    """Prevents plans that wait for outcomes although they could be made, in a model without a module too."""
    model = random_model(9, 1, max_positions=96, recycle_layers=int(with_module))
    engine = local_engine(model, compiled=False, steps="static")
    watched = Watched(engine)
    expected = local_engine(model, compiled=False, steps="flat")
    for temperature in (0.0, 0.8):
        params = SamplingParams(temperature, seed=4, max_new_tokens=30, repetition_penalty=1.2)
        (sequence,) = engine.add([1, 2, 3], params, "autoregressive")
        (other,) = expected.add([1, 2, 3], params, "autoregressive")
        engine.finish([sequence])
        expected.finish([other])
        assert sequence.tokens == other.tokens
    assert watched.ahead == 2 * 29  # all but the prompt's; none for a token after the last one


def test_text_that_ends_unexpectedly() -> None:
    """Prevents a step in vain after the end of a text from being left under way, or from changing what is decoded next."""
    model = random_model(5, 3, max_positions=96, std=0.3)
    engine = local_engine(model, eos_ids=(4,), compiled=False, steps="static")
    watched = Watched(engine)
    flat = local_engine(model, eos_ids=(4,), compiled=False, steps="flat")
    ended = 0
    for seed in range(12):
        params = SamplingParams(1.0, seed=seed, max_new_tokens=40)
        (sequence,) = engine.add([1, 2, seed % 4], params, "autoregressive")
        engine.finish([sequence])
        assert not engine.unfinished and watched.collected == len(watched.plans)
        (other,) = flat.add([1, 2, seed % 4], params, "autoregressive")
        flat.finish([other])
        assert sequence.tokens == other.tokens
        ended += sequence.reason == "eos"
    assert ended > 3, "the test needs texts that end"


def test_drafts_are_not_planned_ahead() -> None:
    """Prevents a plan that takes for granted how many drafts will be accepted."""
    engine = local_engine(random_model(7, 2, max_positions=96, std=0.3), compiled=False, steps="static")
    engine.use_costs(CostModel(((1, 1.0), (100, 1.001)), ((1, 1e-4),)))
    watched = Watched(engine)
    (sequence,) = engine.add([1, 2, 3], SamplingParams(max_new_tokens=30), "verified")
    engine.finish([sequence])
    assert any(part.judged for plan in watched.plans for part in plan.parts)
    for plan, before in zip(watched.plans[1:], watched.plans, strict=False):
        if any(PENDING in part.tokens for part in plan.parts):
            assert all(part.is_plain for part in before.parts)


def test_a_higher_priority_is_not_kept_waiting() -> None:
    """Prevents plans made ahead one after the other that never let a waiting request in."""
    engine = local_engine(random_model(7, 2, max_positions=96), max_batch=1, compiled=False, steps="static")
    (first,) = engine.add([1, 2, 3], SamplingParams(max_new_tokens=60, ignore_eos=True), "autoregressive")
    for _ in range(5):
        engine.step()
    (second,) = engine.add([1, 2], SamplingParams(max_new_tokens=2, ignore_eos=True), "autoregressive", priority=3)
    for _ in range(4):
        engine.step()
    assert second.ended_at is not None and first.ended_at is None


def test_cancelled_sequences_leave_without_a_further_step() -> None:
    """Prevents sequences that were part of a step planned early from holding places and memory for ever."""
    engine = local_engine(random_model(7, 2, max_positions=96), max_batch=3, compiled=False, steps="static")
    asked = [
        engine.add([1, 2, n], SamplingParams(max_new_tokens=60, ignore_eos=True), "autoregressive")[0] for n in (1, 3)
    ]
    for _ in range(5):
        engine.step()
    for one in asked:
        engine.cancel(one)
    assert engine.unfinished, "the test needs a step under way"
    engine.settle()
    assert not engine.unfinished and engine.scheduler.pool.free == engine.scheduler.pool.count


def test_answers_to_one_prompt_start_together() -> None:
    """Prevents answers that share a prompt from waiting for a step in which only the first one is decoded."""
    engine = local_engine(random_model(7, 2, max_positions=96), max_batch=4, compiled=False, steps="static")
    answers = engine.add(
        [1, 2, 3], SamplingParams(0.8, seed=1, n=4, max_new_tokens=10, ignore_eos=True), "autoregressive"
    )
    engine.step()
    engine.step()
    assert [len(one.tokens) - 3 for one in answers] == [2, 1, 1, 1]


def test_what_was_sent_stays_until_it_is_received() -> None:
    """Prevents a result of one step from being read as that of the step before."""
    numbers = torch.arange(6).view(2, 3)
    first, second = Outbox(8, torch.device("cpu")), Outbox(8, torch.device("cpu"))
    first.send([numbers])
    numbers += 10
    second.send([numbers, torch.tensor([0.5], dtype=torch.float64)])
    numbers += 10
    assert first.receive()[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    found = second.receive()
    assert found[0].tolist() == [[10, 11, 12], [13, 14, 15]] and found[1].tolist() == [0.5]
