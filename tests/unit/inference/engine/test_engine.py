"""The engine in one process: answers depend on their requests alone."""

from __future__ import annotations

from typing import Any

import pytest

from recycle_ds.inference import Decoder, DecodingError, SamplingParams
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.plan import Plan
from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation.cost_model import CostModel
from tests.unit.inference.engine.requests import (
    check_answers,
    decode_alone,
    decode_together,
    free_drafts,
    memory_of,
    requests,
    with_texts,
)
from tests.unit.inference.models import Letters, drafts_from_scratch, overfitted_model, random_model


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("batch", "blocks"), [(16, None), (8, 12), (5, 8)])
def test_answers_depend_on_their_requests_alone(seed: int, batch: int, blocks: int | None) -> None:
    """Prevents a batch, an arrival, a preemption, a shared prefix or a draft from changing a token or its probability."""
    model = random_model(7, seed, max_positions=96, std=0.3)
    memory = None if blocks is None else memory_of(model, blocks)
    engine = local_engine(model, max_batch=batch, kv_memory_gib=memory, eos_ids=(6,), text_source=Letters)
    asked = with_texts(requests(64, vocabulary=7, seed=seed), seed)
    found = decode_together(engine, asked)
    check_answers(asked, found, decode_alone(model, asked, eos=6))
    assert sum(sum(one.accepted) for one in found) > 10, "the test needs accepted drafts"
    assert sum(sum(one.tested) - sum(one.accepted) for one in found) > 20, "the test needs rejected drafts"
    assert sum(one.finish_reason == "stop" for one in found) > 2, "the test needs stop strings"
    assert engine.scheduler.reused_tokens > 100, "the test needs shared prefixes"
    assert blocks is None or engine.scheduler.preemptions > 0, "the test needs preemptions"


@pytest.mark.parametrize("drafts", [None, 3])
def test_log_probabilities_reach_the_end_of_the_context(drafts: int | None) -> None:
    """Prevents wrong or missing log probabilities of the last tokens for which the context has room, behind accepted and
    rejected drafts."""
    model = random_model(7, 2, max_positions=48, std=0.3)
    prompts = [[1, 2, 3] * n for n in range(1, 16)]
    params = SamplingParams(max_new_tokens=80, logprobs=2, draft_tokens=drafts)
    engine = free_drafts(local_engine(model, max_batch=6))
    found = [engine.add(prompt, params, "verified")[0] for prompt in prompts]
    engine.finish(found)
    accepted, tested = (sum(sum(getattr(one.tally, name)) for one in found) for name in ("accepted", "tested"))
    assert accepted > 10 and tested - accepted > 10, "the test needs accepted and rejected drafts"
    for prompt, one in zip(prompts, found, strict=True):
        assert one.reason == "context" and len(one.tokens) == 48 and len(one.logprobs) == 48 - len(prompt)
        alone = Decoder(model)
        (other,) = alone.engine.add(prompt, params, "autoregressive")
        alone.engine.finish([other])
        assert one.tokens == other.tokens
        for (value, best), (expected, others) in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(value - expected) < 1e-4 and [token for token, _ in best] == [token for token, _ in others]


def test_several_answers_to_a_prompt() -> None:
    """Prevents n answers that are equal, or that differ from single requests with the seeds that they stand for."""
    model = random_model(7, 1, max_positions=96)
    prompt = [1, 2, 3] * 11
    params = SamplingParams(temperature=1.2, seed=40, n=3, max_new_tokens=20, draft_tokens=2)
    engine = local_engine(model, max_batch=4)
    answers = engine.add(prompt, params, "verified")
    engine.finish(answers)
    assert engine.scheduler.reused_tokens == 2 * (len(prompt) - 1), "the prompt is read once"
    for index, answer in enumerate(answers):
        single = Decoder(model).generate(
            prompt, "autoregressive", TokenSampling(temperature=1.2, seed=40 + index), max_new_tokens=20
        )
        assert tuple(answer.tokens[len(prompt) :]) == single.token_ids
    assert len({tuple(answer.tokens) for answer in answers}) == 3


def test_the_module_remembers_a_shared_prefix() -> None:
    """Prevents acceptance from falling where a prompt's beginning is found in the cache without the module's entries."""
    model = random_model(8, 6, max_positions=128)
    prefix = [1, 2, 3, 4, 5] * 7
    engine = local_engine(model, max_batch=2)
    for mode in ("autoregressive", "verified"):  # the first one leaves blocks without the module's entries
        engine.finish(engine.add([*prefix, 0], SamplingParams(max_new_tokens=4, draft_tokens=2), mode))
        (later,) = engine.add([*prefix, 2, 2], SamplingParams(max_new_tokens=12, draft_tokens=3), "verified")
        while later.ended_at is None:
            engine.step()
            assert list(later.drafts) == drafts_from_scratch(model, later.tokens, len(later.drafts))
    assert engine.scheduler.reused_tokens >= 3 * 32


def test_a_request_larger_than_the_cache_is_refused() -> None:
    """Prevents a request that can never run from waiting for ever, and all later ones behind it."""
    model = random_model(7, 1, max_positions=96)
    engine = local_engine(model, max_batch=2, kv_memory_gib=memory_of(model, 4))
    with pytest.raises(
        DecodingError, match=r"need 96 positions of KV cache, which holds 64: raise --kv-memory-gib, or"
    ):
        engine.add([1] * 60, SamplingParams(max_new_tokens=15), "autoregressive")
    with pytest.raises(DecodingError, match="too little memory for a KV cache: two blocks of 16 positions need"):
        local_engine(model, kv_memory_gib=1e-9)


@pytest.mark.parametrize(
    ("changes", "mode", "words"),
    [
        ({"bad_tokens": (7,)}, "verified", "bad_tokens: the token id 7 is none of the model's, which are 0 to 6"),
        ({"logit_bias": {9: 1.0}}, "verified", "logit_bias: the token id 9 is none of the model's"),
        ({"stop_tokens": (8,)}, "verified", "stop_tokens: the token id 8 is none of the model's"),
        ({"logprobs": 1}, "alternate", "does not score the recycled tokens"),
        ({"logprobs": 8}, "verified", "the model's vocabulary has 7 tokens"),
        ({"allowed_tokens": (3,), "stop_tokens": (3,), "min_new_tokens": 1}, "verified", "no token is left"),
    ],
)
def test_parameters_that_the_model_cannot_serve_are_refused(changes: dict[str, Any], mode: str, words: str) -> None:
    """Prevents an index error in the middle of a batch, or a parameter that is silently ignored."""
    engine = local_engine(random_model(7, 1))
    with pytest.raises(DecodingError, match=words):
        engine.add([1], SamplingParams(**changes), mode)
    assert not engine.unfinished


def test_an_exception_in_a_step_leaves_the_engine_usable() -> None:
    """Prevents Ctrl-C in the middle of a batch from breaking the engine for later requests, and from keeping their
    memory."""
    model = random_model(7, 1, max_positions=96)
    engine = local_engine(model, max_batch=4)
    params = SamplingParams(max_new_tokens=20, draft_tokens=2)
    run = engine._executor.submit

    def interrupt(plan: Plan) -> None:
        raise KeyboardInterrupt

    engine.add([1, 2], params)
    engine.step()
    engine.add([1, 3], params)
    engine._executor.submit = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine._executor.submit = run  # type: ignore[method-assign]
    assert not engine.unfinished and engine.scheduler.pool.free == engine.scheduler.pool.count
    (answer,) = engine.add([1, 2], params)
    engine.finish([answer])
    expected = Decoder(model).generate([1, 2], "autoregressive", max_new_tokens=20)
    assert tuple(answer.tokens[2:]) == expected.token_ids


def test_a_request_may_be_cancelled_by_its_own_callback() -> None:
    """Prevents an error when a client that reads the tokens goes away: that is where its request is cancelled."""
    engine = local_engine(random_model(7, 1, max_positions=96), max_batch=4)
    params = SamplingParams(max_new_tokens=20, draft_tokens=2)
    answers = engine.add([1, 2], params, on_tokens=lambda ids, recycled: engine.cancel(answers[0]))
    answers += engine.add([1, 3], params)
    engine.finish(answers)
    assert [answer.reason for answer in answers] == ["interrupted", "length"]
    assert engine.scheduler.pool.free == engine.scheduler.pool.count


@pytest.mark.parametrize("draft_tokens", [50, 200])
def test_many_drafts_fit_into_the_cache_of_one_request(draft_tokens: int) -> None:
    """Prevents a request that can never go on, because its drafts need more memory than its longest text."""
    model = random_model(7, 1, max_positions=96)
    found = Decoder(model).generate([1] * 6, "verified", max_new_tokens=90, draft_tokens=draft_tokens)
    expected = Decoder(model).generate([1] * 6, "autoregressive", max_new_tokens=90)
    assert found.token_ids == expected.token_ids


@pytest.mark.parametrize("draft_tokens", [7, None])
def test_stop_strings_inside_accepted_drafts(draft_tokens: int | None) -> None:
    """Prevents a block from being offered to others with tokens that a stop string has cut off."""
    model = overfitted_model([1, 2, 3, 4, 5, 6], vocab_size=8, steps=60)
    recycled = 0
    for length in range(1, 20):
        engine = free_drafts(local_engine(model, max_batch=2, text_source=Letters))
        prompt = ([1, 2, 3, 4, 5, 6] * 4)[:length]
        params = SamplingParams(max_new_tokens=30, draft_tokens=draft_tokens, stop=("gb",))
        (answer,) = engine.add(prompt, params)
        engine.finish([answer])
        expected = Decoder(model, None, Letters).generate(prompt, "autoregressive", max_new_tokens=30, stop=["gb"])
        assert tuple(answer.tokens[length:]) == expected.token_ids
        recycled += sum(answer.recycled)
        engine.scheduler.check()
    assert recycled > 30, "the test needs accepted drafts"


@pytest.mark.parametrize(("mode", "counts"), [("autoregressive", True), ("verified", True), ("alternate", False)])
def test_only_steps_like_those_that_were_measured_correct_the_costs(mode: str, counts: bool) -> None:
    """Prevents adaptive drafting that others disturb: chains of `alternate` decoding take other steps than trees."""
    engine = local_engine(random_model(7, 1), max_batch=2)
    engine.use_costs(CostModel(((1, 1.0), (8, 1.1), (64, 2.0)), ((1, 0.05),)))  # seconds: far from what steps take
    engine.finish(engine.add([1, 2, 3], SamplingParams(max_new_tokens=20), mode))
    costs = engine.scheduler.budget.costs
    assert (costs.full_scale < 1) == counts
    assert counts or (costs.drafting_scale, costs.sizes_scale) == (1.0, [1.0] * 3)


def test_drafts_that_are_not_verified_say_nothing_of_acceptance() -> None:
    """Prevents a stream that hardly drafts after `alternate` decoding on the same engine: each recycled token counted as a
    rejected draft, and verified decoding then made 1.4 instead of 1.8 tokens per full call."""
    engine = free_drafts(local_engine(random_model(7, 1), max_batch=2))
    before = engine.scheduler.budget.acceptance(99)
    engine.finish(engine.add([1, 2, 3], SamplingParams(max_new_tokens=30), "alternate"))
    assert engine.scheduler.budget.acceptance(99) == before
    engine.finish(engine.add([1, 2, 3], SamplingParams(max_new_tokens=30), "verified"))
    assert engine.scheduler.budget.acceptance(99) != before
