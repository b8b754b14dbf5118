"""Stacks that read tokens and states from the cache, against the same stacks that are given them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from recycle_ds.inference.engine.cache import Cache, Tokens
from recycle_ds.inference.engine.drafting.entries import read_cache, run_module
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native import arena
from recycle_ds.inference.native.spans import Span
from tests.unit.inference.native.kernels import bf16_model, needs_kernels

# two sequences in scattered blocks: prompts, single tokens, and a tree of drafts beside a chain
STEPS = (
    [Span((3, 0), 0, 14), Span((5,), 0, 3)],
    [Span((3, 0), 14, 1), Span((5,), 3, 1)],
    [Span((3, 0), 15, 6, root=15, parents=(0, 0, 1, 2, 2)), Span((5,), 4, 4)],
)


def _given(weights: StageWeights, cache: Cache, spans: Sequence[Span], ids: Sequence[int]) -> Tensor:
    """The step as it is computed where the kernels do not read the cache."""
    slots_T = cache.slots(spans)
    x_TD = weights.embed(torch.tensor(ids))
    states_TD = weights.run(x_TD, Tokens(cache.keys_values, spans, slots_T, cache.block_size))
    cache.tokens[slots_T] = torch.tensor(ids)
    if weights.module is not None:
        cache.hidden[slots_T] = states_TD
    return states_TD[:, : weights.width]


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("taps", [(), (0, 1), (1,), (0, 1, 2)], ids=["no taps", "two taps", "one tap", "three taps"])
def test_what_the_cache_contains_is_read_and_kept(
    taps: tuple[int, ...], int8: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a state, a tapped state or an embedding from the slot of another token or sequence, or states kept where another
    sequence's are: drafts would become worse, and nothing else. With three taps their joint is the widest of all inputs. The
    two kinds of calls take turns, so that neither finds what the other one has left in the stack."""
    weights = StageWeights(bf16_model(vocab_size=45, hidden=64, layers=3, taps=taps, int8=int8))
    caches = []
    for least in (0, 2**40):  # the first one in huge pages
        monkeypatch.setattr(arena, "_LEAST_SIZE", least)
        caches.append(Cache(weights, 6, 16))
        for tensor in (caches[-1].keys_values, caches[-1].module_keys_values, caches[-1].hidden):
            tensor.zero_()
        caches[-1].tokens.zero_()
    own, other = caches
    assert own.contents is not None
    generator = torch.Generator().manual_seed(3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            for spans in STEPS:
                ids = torch.randint(0, 45, (sum(span.count for span in spans),), generator=generator).tolist()
                own.write_tokens(spans, ids)
                found = weights.run_in_cache(own.contents, spans, own.keys_values)
                assert torch.equal(found, _given(weights, other, spans, ids))
                assert torch.equal(own.tokens, other.tokens) and torch.equal(own.hidden, other.hidden)
                assert torch.equal(own.keys_values, other.keys_values) and own.hidden.abs().sum() > 0
                reading = [
                    Span(span.blocks, max(span.first, 1), span.end - max(span.first, 1), lowest=1) for span in spans
                ]
                slots_T = other.slots(reading)
                hidden = other.hidden[other.slots([Span(one.blocks, one.first - 1, one.count) for one in reading])]
                expected = run_module(weights, other, hidden, other.tokens[slots_T], reading, slots_T)
                assert torch.equal(read_cache(weights, own, reading), expected)
                assert torch.equal(own.module_keys_values, other.module_keys_values)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_a_model_without_a_module_keeps_no_states() -> None:
    """Prevents writes behind the end of a cache that has no room for states."""
    model = bf16_model(vocab_size=45, hidden=64)
    model.recycle = None
    weights = StageWeights(model)
    own, other = Cache(weights, 6, 16), Cache(weights, 6, 16)
    assert own.contents is not None and not len(own.hidden)
    with torch.inference_mode():
        for spans in STEPS:
            ids = [(5 * i + 2) % 45 for i in range(sum(span.count for span in spans))]
            own.write_tokens(spans, ids)
            found = weights.run_in_cache(own.contents, spans, own.keys_values)
            assert torch.equal(found, _given(weights, other, spans, ids))


def test_other_models_are_given_tokens_and_states() -> None:
    """Prevents fp32 weights that are read as bf16."""
    model = bf16_model(vocab_size=45, hidden=64).float()
    assert Cache(StageWeights(model), 6, 16).contents is None
