"""Decoding in CUDA graphs against decoding without them, token for token. A rehearsal has static buffers without graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from recycle_ds.inference import SamplingParams
from recycle_ds.inference.engine.build import Steps, local_engine
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.plan import Plan
from recycle_ds.model import RecycleGPT
from tests.gpu.device import device, rehearsal
from tests.unit.inference.engine.device.attention_cases import check
from tests.unit.inference.engine.device.product_cases import check_products
from tests.unit.inference.engine.device.twins import twin_engine
from tests.unit.inference.engine.device.watched import Watched
from tests.unit.inference.engine.requests import decode_together, free_drafts, memory_of, requests
from tests.unit.inference.models import random_model


def _steps() -> Steps:
    return "static" if rehearsal() else "graphs"


def _model(seed: int, dtype: torch.dtype = torch.float32, *, int8: bool = False) -> RecycleGPT:
    model = copy.deepcopy(random_model(7, seed, max_positions=96, std=0.3)).to(device(), dtype)
    model.int8 = int8
    return model


def _check_tokens(seed: int, batch: int, blocks: int | None) -> None:
    model = _model(seed)
    memory = None if blocks is None else memory_of(model, blocks)
    engine, twins = twin_engine(model, batch, memory, eos=6, steps=_steps(), compare_drafts=False)
    free_drafts(engine)
    for _ in range(2):  # the second time mostly from graphs
        asked = requests(32, vocabulary=7, seed=seed)
        decode_together(
            engine, [replace(one, params=replace(one.params, logprobs=None, prompt_logprobs=False)) for one in asked]
        )
    assert twins.seen["fits"] > 50 and twins.seen["accepted"] > 10 and twins.seen["does not fit"] == 0


def test_tokens_in_graphs_are_those_without() -> None:
    """Prevents a graph that reads a buffer that has moved, or was captured for another shape, in any mode."""
    _check_tokens(0, 16, None)


def test_tokens_in_graphs_are_those_without_under_preemption() -> None:
    """Prevents the same faults where sequences give up their blocks."""
    _check_tokens(1, 5, 8)


def test_tokens_do_not_depend_on_steps_that_are_started_early() -> None:
    """Prevents a step that reads a token before the step before it has stored it, or whose results are read too early."""
    asked = requests(32, vocabulary=7, seed=3, modes=("autoregressive",))
    asked = [replace(one, params=replace(one.params, logprobs=None, prompt_logprobs=False)) for one in asked]
    asked = [replace(one, cancelled_after=None) for one in asked]
    found = []
    for ahead in (True, False):
        engine = local_engine(_model(3), max_batch=6, eos_ids=(6,), steps=_steps())
        engine.looks_ahead = ahead
        watched = Watched(engine)
        decode_together(engine, asked)  # captures graphs
        assert (watched.ahead > 20) == ahead, "the test needs steps that are started early"
        found.append([one.token_ids for one in decode_together(engine, asked)])
    assert found[0] == found[1]


def _texts(engine: DecodingEngine, params: SamplingParams) -> list[list[int]]:
    answers = [engine.add(prompt, params)[0] for prompt in ([1, 2], [2, 3, 1], [4], [0, 1, 2, 3] * 8)]
    engine.finish(answers)
    return [one.tokens for one in answers]


def _check_bf16(*, int8: bool) -> None:
    model, params = _model(2, torch.bfloat16, int8=int8), SamplingParams(max_new_tokens=40, temperature=0.8, seed=4)
    graphs, static = (free_drafts(local_engine(model, max_batch=4, steps=kind)) for kind in (_steps(), "static"))
    first, again, expected = _texts(graphs, params), _texts(graphs, params), _texts(static, params)
    assert first == again == expected


def test_bf16_in_graphs_is_bf16_without() -> None:
    """Prevents graphs from computing anything else than the same operations one after the other."""
    _check_bf16(int8=False)


def test_int8_in_graphs_is_int8_without() -> None:
    """Prevents the same fault with 8-bit weights. PyTorch's product for CPUs takes no matrices as small as these."""
    if rehearsal():
        return
    _check_bf16(int8=True)


def test_texts_fill_the_context() -> None:
    """Prevents unused rows behind the last position from being looked up in tables of positions: that ends the process."""
    model = _model(4)
    engine, twins = twin_engine(model, 4, steps=_steps(), compare_drafts=False)
    free_drafts(engine)
    for drafts in (None, 4):
        answers = []
        for length, mode in ((1, "verified"), (80, "verified"), (90, "autoregressive"), (94, "verified")):
            prompt = [(i * i + length) % 7 for i in range(length)]
            answers += engine.add(prompt, SamplingParams(draft_tokens=drafts), mode)
        engine.finish(answers)
        assert {len(one.tokens) for one in answers} == {96} and twins.seen["does not fit"] == 0


def test_no_step_waits_inside() -> None:
    """Prevents an operation that waits for the device, which PyTorch reports as an error here."""
    # set_sync_debug_mode raises inside the step: that is the assertion
    engine = free_drafts(local_engine(_model(3), max_batch=4, steps=_steps()))
    _texts(engine, SamplingParams(max_new_tokens=20))  # compiles and captures
    submit: Callable[[Plan], None] = engine._executor.submit

    def strict(plan: Plan) -> None:
        decodes = bool(plan.parts) and all(part.start >= part.prompt_tokens for part in plan.parts)
        if rehearsal() or not decodes:
            submit(plan)
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            submit(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    executor: Any = engine._executor
    executor.submit = strict
    _texts(engine, SamplingParams(max_new_tokens=20))


def test_the_kernels_compute_what_they_should() -> None:
    """Prevents a fault of the kernels that only the GPU's compiler or memory shows."""
    if rehearsal():
        return
    from recycle_ds.inference.engine.device.int8_kernel import multiply
    from recycle_ds.inference.engine.device.paged_kernel import paged

    check(paged, device().type)
    check_products(multiply, device().type)
