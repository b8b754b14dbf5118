"""Steps in static buffers, without graphs, on the CPU: the choices of the engine without padding, plan by plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.device.runner import DeviceRunner
from recycle_ds.inference.parameters import SamplingParams
from tests.unit.inference.engine.device.twins import twin_engine
from tests.unit.inference.engine.requests import (
    Asked,
    check_answers,
    decode_alone,
    decode_together,
    free_drafts,
    memory_of,
    requests,
)
from tests.unit.inference.models import random_model


def _asked(count: int, seed: int) -> list[Asked]:
    """Random requests without log probabilities, which the runner without padding computes."""
    asked = requests(count, vocabulary=7, seed=seed)
    return [replace(one, params=replace(one.params, logprobs=None, prompt_logprobs=False)) for one in asked]


@pytest.mark.parametrize(("seed", "batch", "blocks"), [(0, 16, None), (1, 5, 8)])
def test_every_choice_is_the_one_without_padding(seed: int, batch: int, blocks: int | None) -> None:
    """Prevents padding, a bucket, a preemption, a shared prefix or a parameter from changing a token or a draft."""
    model = random_model(7, seed, max_positions=96, std=0.3)
    memory = None if blocks is None else memory_of(model, blocks)
    engine, twins = twin_engine(model, batch, memory, eos=6)
    free_drafts(engine)
    asked = _asked(32, seed)
    found = decode_together(engine, asked)
    check_answers(asked, found, decode_alone(model, asked, eos=6))
    assert engine.scheduler.reused_tokens > 100, "the test needs shared prefixes"
    assert blocks is None or engine.scheduler.preemptions > 0, "the test needs preemptions"
    for kind in ("fits", "mixed", "chains", "accepted"):
        assert twins.seen[kind] > 5, f"the test needs {kind}: {twins.seen}"
    assert twins.seen["does not fit"] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_trees_are_those_without_padding(temperature: float) -> None:
    """Prevents a node that sees its siblings, has the position of its slot or is not moved where it belongs once accepted."""
    model = random_model(6, 2, max_positions=96, std=0.3)
    engine, twins = twin_engine(model, 3, eos=5)
    free_drafts(engine)
    answers = []
    for prompt in ([1], [2, 0, 4], [3, 3], [1, 2, 3, 4] * 5):
        params = SamplingParams(temperature, seed=len(prompt), max_new_tokens=40, ignore_eos=len(prompt) > 1)
        answers += engine.add(prompt, params)
    engine.finish(answers)
    for kind in ("trees", "moves", "accepted"):
        assert twins.seen[kind] > 5, f"the test needs {kind}: {twins.seen}"


def test_a_vocabulary_with_fewer_tokens_than_a_node_has_children() -> None:
    """Prevents places of children from being counted differently on the device and on the host."""
    engine, twins = twin_engine(random_model(3, 1, max_positions=96), 2)
    free_drafts(engine)
    for prompt in ([1], [2, 0]):
        engine.add(prompt, SamplingParams(max_new_tokens=40, temperature=0.7, seed=3))
    engine.finish(list(engine.scheduler.waiting))
    assert twins.seen["trees"] > 5


@pytest.mark.parametrize("taps", [(), (0, 1)])
def test_module_with_taps_and_a_confidence_layer(taps: tuple[int, ...]) -> None:
    """Prevents states of tapped layers, or confidences by the module's own layer, from being mixed up between rows."""
    model = random_model(9, 3, layers=3, max_positions=96, std=0.4, taps=taps)
    engine, twins = twin_engine(model, 4)
    free_drafts(engine)
    for length in (1, 20, 40):
        engine.add([1 + i * i % 7 for i in range(length)], SamplingParams(max_new_tokens=24))
    engine.finish(list(engine.scheduler.waiting))
    assert twins.seen["trees"] > 10


@pytest.mark.parametrize("prompts", [(1,), (40,), (45, 2), (30, 44, 3), (44, 1, 20, 45)])
@pytest.mark.parametrize("drafts", [None, 4, 8])
def test_texts_that_fill_the_context(prompts: tuple[int, ...], drafts: int | None) -> None:
    """Prevents unused rows behind the last position from being looked up in tables of positions, which ends every request on
    a GPU: rows of the sequence itself, and of others that still draft."""
    engine, twins = twin_engine(random_model(4, 2, max_positions=48), 4)
    free_drafts(engine)
    modes = ("verified", "autoregressive") if len(prompts) == 3 else ("verified",)
    answers = []
    for index, length in enumerate(prompts):
        params = SamplingParams(draft_tokens=drafts)
        answers += engine.add([(i * i + index) % 4 for i in range(length)], params, modes[index % len(modes)])
    engine.finish(answers)
    assert {len(one.tokens) for one in answers} == {48} and twins.seen["does not fit"] == 0


def test_long_prompts_are_read_without_padding() -> None:
    """Prevents a chunk of a prompt, or slots that the module has not read for long, from missing the fields' room."""
    model = random_model(7, 2, max_positions=700, std=0.3)
    engine, twins = twin_engine(model, 8)
    free_drafts(engine)
    for index, length in enumerate((600, 3, 260, 90)):
        params = SamplingParams(max_new_tokens=30, draft_tokens=(None, 3)[index % 2])
        engine.add([(i * i + index) % 7 for i in range(length)], params, "verified" if index else "autoregressive")
    engine.finish(list(engine.scheduler.waiting))
    assert twins.seen["chunks"] > 1 and twins.seen["mixed"] > 0 and twins.seen["does not fit"] == 0


def test_answers_that_share_a_prompt() -> None:
    """Prevents a block that several answers share from being written by one of them."""
    engine, twins = twin_engine(random_model(7, 1, max_positions=96), 4)
    free_drafts(engine)
    params = SamplingParams(temperature=1.2, seed=40, n=3, max_new_tokens=20, top_k=5)
    engine.finish(engine.add([1, 2, 3] * 11, params, "verified"))
    assert twins.seen["copies"] > 0 and twins.seen["does not fit"] == 0


def test_other_requests_are_run_without_padding() -> None:
    """Prevents log probabilities or drafts that are verified by rejection from being lost, beside one that needs neither."""
    model = random_model(7, 1, max_positions=96)
    engine = local_engine(model, max_batch=4, steps="static")
    assert isinstance(engine._executor._runner, DeviceRunner)  # type: ignore[attr-defined]
    (scored,) = engine.add([1, 2], SamplingParams(max_new_tokens=9, logprobs=2, prompt_logprobs=True))
    (drawn,) = engine.add([1, 3], SamplingParams(max_new_tokens=9, temperature=1.0, draft_tokens=3))
    (plain,) = engine.add([1, 4], SamplingParams(max_new_tokens=30))
    engine.finish([scored, drawn, plain])
    assert len(scored.logprobs) == 9 and len(scored.prompt_logprobs) == 1 and len(drawn.tokens) == 11
    expected = local_engine(model)
    (same,) = expected.add([1, 4], SamplingParams(max_new_tokens=30), "autoregressive")
    expected.finish([same])
    assert plain.tokens == same.tokens
