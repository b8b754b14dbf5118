"""Blocks in the compiled kernels against the model itself, and decoding with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from recycle_ds.config import RopeConfig
from recycle_ds.inference import Decoder, SamplingParams
from recycle_ds.inference.decoder import decode_one
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.costs.cost_file import cost_file
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.native.stack import NativeStack
from tests.unit.inference.engine.requests import check_answers, decode_alone, decode_together, memory_of, requests
from tests.unit.inference.models import drafts_from_scratch, spread_added
from tests.unit.inference.native.kernels import bf16_model, needs_kernels

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "four query heads to one": {"hidden": 64, "heads": 4},
    "five query heads to one": {"heads": 5, "head_dim": 16},
    "many key heads": {"hidden": 96, "heads": 6, "kv_heads": 3},
    "wide heads": {"heads": 2, "kv_heads": 2, "head_dim": 80},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 64},
    "layers without rotation": {"rope": RopeConfig(unrotated_layers=(1,))},
    "untied": {"tied_embeddings": False, "vocab_size": 45},
}


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_model(family: str) -> None:
    """Prevents a wrong head, rotation, bias, norm or mask: states after 37 tokens in pieces, through scattered blocks."""
    changes = {"init_std": 0.15, **FAMILIES[family]}
    model = bf16_model(**changes)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():  # biases and norms are constant at first
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).bfloat16()
        assert parameter.dtype == torch.bfloat16, name
    ids = torch.randint(0, 7, (37,), generator=generator)
    with torch.inference_mode():
        expected = copy.deepcopy(model).float().hidden_states(ids[None])[:, 0]
        stack = NativeStack(list(model.blocks.values()), model.rotary, model.final_norm)
        weights = StageWeights(model)
        shape = (2, 6 * 16, 2 * weights.kv_heads, weights.channels)
        cache = torch.full(shape, torch.nan, dtype=torch.bfloat16)  # as uninitialised memory may be
        other, table, found = (3,), (5, 0, 2), []
        for first, count in ((0, 1), (1, 4), (5, 20), (25, 12)):
            spans = [Span(table, first, count), Span(other, 0, 3)]
            x = model.embedding.weight[torch.cat((ids[first : first + count], ids[:3]))]
            found.append(stack((x,), spans, cache)[0][:count])
    difference = (torch.cat(found).float() - expected).abs()
    assert difference.mean() < 0.02 * expected.abs().mean()
    assert difference.max() < 0.2 * expected.abs().max()


@needs_kernels
def test_joined_inputs_and_tapped_states() -> None:
    """Prevents tapped states that are not those after their block, and an added input that is ignored."""
    model = bf16_model(layers=3)
    blocks = list(model.blocks.values())
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    span = [Span((0,), 0, 5)]
    cache = torch.zeros(3, 16, 2, 16, dtype=torch.bfloat16)
    with torch.inference_mode():
        whole = NativeStack(blocks, model.rotary, None)
        states, tapped = whole((x,), span, cache, taps=(0, 1))
        for number, found in enumerate(tapped):
            alone = NativeStack(blocks[: number + 1], model.rotary, None)
            assert torch.equal(alone((x,), span, cache)[0], found)
        assert torch.equal(whole((x,), span, cache)[0], states)
        assert model.recycle is not None
        weights = StageWeights(model)
        assert weights.module is not None and weights.module.stack is not None
        joined = weights.module.stack((x, x), span, cache)[0]
        zeros, ones = torch.zeros_like(x), torch.ones_like(x)
        assert torch.equal(weights.module.stack((x, x), span, cache, added=zeros)[0], joined)
        assert not torch.equal(weights.module.stack((x, x), span, cache, added=ones)[0], joined)


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("seed", "batch", "blocks"), [(0, 16, None), (1, 8, 12)])
def test_bf16_answers_depend_on_their_requests_alone(seed: int, batch: int, blocks: int | None, int8: bool) -> None:
    """Prevents a draft, a batch, a shared prefix or a preemption from changing a token: in bf16 and int8 as in fp32."""
    model = bf16_model(seed, int8=int8)
    memory = None if blocks is None else memory_of(model, blocks)
    engine = local_engine(model, max_batch=batch, kv_memory_gib=memory, eos_ids=(6,))
    asked = requests(48, vocabulary=7, seed=seed)
    found = decode_together(engine, asked)
    check_answers(asked, found, decode_alone(model, asked, eos=6))
    assert sum(sum(one.accepted) for one in found) > 10, "the test needs accepted drafts"
    assert blocks is None or engine.scheduler.preemptions > 0, "the test needs preemptions"


@needs_kernels
def test_costs_of_other_arithmetic_are_not_used() -> None:
    """Prevents the draft budget of int8, or of a machine that has got a compiler, from counting with the costs before."""
    found = {
        (int8, compiled): cost_file(bf16_model(int8=int8), 1, 1, compiled=compiled)
        for int8 in (False, True)
        for compiled in (False, True)
    }
    assert len({file.path for file in found.values() if file is not None}) == 4


@pytest.mark.parametrize("int8", [False, True])
def test_paths_agree(int8: bool) -> None:
    """Prevents decoding without the compiled kernels from computing something else."""
    model = bf16_model(3, int8=int8, init_std=0.1, vocab_size=40)
    plain = StageWeights(model, compiled=False)
    assert plain.why_not_compiled == "they are switched off"
    engine = local_engine(model, max_batch=1, compiled=False)
    fast = Decoder(model)
    agreeing = 0
    for token in range(6):
        params = SamplingParams(max_new_tokens=1, logprobs=1)
        one = decode_one(engine, [token, 3, 5, token], params, "autoregressive")
        two = decode_one(fast.engine, [token, 3, 5, token], params, "autoregressive")
        assert abs(one.logprobs[0][0] - two.logprobs[0][0]) < 0.1
        agreeing += one.token_ids == two.token_ids
    assert agreeing >= 5


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
def test_drafts_use_tapped_states(int8: bool) -> None:
    """Prevents kernels that leave a module's tapped states out, or add them in another place than training does."""
    model = spread_added(bf16_model(3, taps=(0, 2), layers=3))
    model.int8 = int8
    reference, untapped = copy.deepcopy(model).float(), copy.deepcopy(model).float()
    assert untapped.recycle is not None and untapped.recycle.tap_projection is not None
    untapped.recycle.tap_projection.weight.data.zero_()
    engine = local_engine(model, max_batch=1)
    (sequence,) = engine.add([1, 2, 3], SamplingParams(max_new_tokens=60, draft_tokens=3), "verified")
    found = []
    while sequence.ended_at is None:
        engine.step()
        if sequence.drafts:
            expected = [
                drafts_from_scratch(one, sequence.tokens, len(sequence.drafts)) for one in (reference, untapped)
            ]
            found.append([list(sequence.drafts) == one for one in expected])
    tapped, without = (sum(row) for row in zip(*found, strict=True))
    assert len(found) > 10 and tapped > 0.8 * len(found)  # near ties fall another way
    assert without < 0.5 * len(found)
