"""Drafts against a computation from scratch, and acceptance of an overfitted model."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from recycle_ds.inference import Decoder
from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation.drafting import Drafts
from recycle_ds.inference.speculation.sampling import penalise
from recycle_ds.inference.speculation.stopping import StopCondition
from recycle_ds.inference.stream import Stream
from recycle_ds.model import RecycleGPT
from tests.unit.inference.models import overfitted_model, random_model


def drafts_from_scratch(model: RecycleGPT, tokens: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """Greedy drafts by definition: all backbone entries (h_p, x_{p+1}) at once, then draft by draft, in new caches."""
    cache = model.new_cache(1, len(tokens) + count)
    known_1T = torch.tensor([tokens])
    hidden_TBD = model.decode(known_1T[:, :-1], cache)
    state = model.recycle_decode(hidden_TBD, known_1T[:, 1:], cache)[-1:]
    drafts: list[int] = []
    while True:
        logits_V = penalise(model.logits(state)[0, 0], penalty, torch.tensor([*tokens, *drafts]))
        drafts.append(int(logits_V.argmax()))
        if len(drafts) == count:
            return drafts
        state = model.recycle_decode(state, torch.tensor([drafts[-1:]]), cache)


def _stream(model: RecycleGPT, prompt: list[int], limit: int, params: TokenSampling, eos: frozenset[int]) -> Stream:
    return Stream(model, prompt, params, StopCondition(eos, limit, "length"), eos, None, time.perf_counter)


@pytest.mark.parametrize("recycle_layers", [1, 2])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@torch.inference_mode()
def test_drafts_are_those_of_a_computation_from_scratch(recycle_layers: int, penalty: float) -> None:
    """Prevents stale entries of rejected drafts, shifted positions and wrong states, which verification would hide."""
    model = random_model(8, 5, recycle_layers=recycle_layers)
    stream = _stream(model, [1, 2, 3, 4], 36, TokenSampling(repetition_penalty=penalty), frozenset())
    stream.prefill(with_module=True)
    known = [1, 2, 3, 4, *stream.result("length").token_ids]
    lengths = [3, 1, 4, 2, 1, 5, 3, 2]
    for count in lengths:
        drafts = stream.drafter.draft(stream.length, count)
        assert stream.draft_ids(drafts.count) == drafts_from_scratch(model, known, count, penalty)
        stream.verify(drafts)
        known = [1, 2, 3, 4, *stream.result("length").token_ids]
    assert 0 < sum(stream.tally.accepted) < sum(lengths), "the test needs accepted and rejected drafts"


@torch.inference_mode()
def test_positions_skipped_without_drafts_are_read_later() -> None:
    """Prevents gaps in the module's KV cache after cycles without drafts."""
    model = random_model(8, 6)
    stream = _stream(model, [1, 2], 30, TokenSampling(), frozenset())
    stream.prefill(with_module=True)
    calls = stream.drafter.calls
    for _ in range(6):
        stream.verify(Drafts(0, None))
    assert stream.drafter.calls == calls
    drafts = stream.drafter.draft(stream.length, 3)
    assert stream.drafter.calls == calls + 3  # all skipped positions in one call
    assert stream.draft_ids(drafts.count) == drafts_from_scratch(model, [1, 2, *stream.result("length").token_ids], 3)


@pytest.mark.parametrize("count", [1, 2, 4])
@torch.inference_mode()
def test_alternate_keeps_the_tokens_of_the_module(count: int) -> None:
    """Prevents the paper's mode from reading states, tokens or positions other than those of the text it keeps."""
    model = random_model(8, 7)
    expected = [1, 2, 3]
    while len(expected) < 3 + 20:
        read_1T = torch.tensor([expected])
        hidden_TBD = model.decode(read_1T, model.new_cache(1, len(expected)))
        expected.append(int(model.logits(hidden_TBD[-1:]).argmax()))
        expected += drafts_from_scratch(model, expected, count)
    found = Decoder(model).generate([1, 2, 3], "alternate", max_new_tokens=20, draft_tokens=count)
    assert list(found.token_ids) == expected[3:23]
    assert found.recycled == tuple(i % (count + 1) > 0 for i in range(20))


@torch.inference_mode()
def test_drafting_stops_at_a_drafted_end_of_sequence() -> None:
    """Prevents module calls for tokens that can never be kept."""
    model = random_model(4, 9)
    unlimited = _stream(model, [1, 2, 3], 20, TokenSampling(), frozenset())
    unlimited.prefill(with_module=True)
    unlimited.drafter.draft(unlimited.length, 8)
    ids = unlimited.draft_ids(8)
    eos = ids[0]
    limited = _stream(model, [1, 2, 3], 20, TokenSampling(), frozenset({eos}))
    limited.prefill(with_module=True)
    assert limited.drafter.draft(limited.length, 8).count == 1


@torch.inference_mode()
def test_sampled_drafts_come_with_their_distributions() -> None:
    """Prevents verifying a draft with another distribution than its own, which would bias the output."""
    model = random_model(6, 2)
    params = TokenSampling(temperature=0.8, top_k=3, repetition_penalty=1.2, seed=1)
    stream = _stream(model, [1, 2, 3], 20, params, frozenset())
    stream.prefill(with_module=True)
    drafts = stream.drafter.draft(stream.length, 4)
    assert drafts.probs_NV is not None and drafts.probs_NV.shape == (4, 6)
    torch.testing.assert_close(drafts.probs_NV.sum(-1), torch.ones(4))
    assert ((drafts.probs_NV > 0).sum(-1) <= 3).all()
    assert all(drafts.probs_NV[i, token] > 0 for i, token in enumerate(stream.draft_ids(4)))


@pytest.fixture(scope="module")
def overfitted() -> tuple[RecycleGPT, list[int]]:
    """A model overfitted on a text, and the text. No single token of the text determines the next one."""
    text = [1, 2, 3, 1, 4, 2, 5, 3, 2, 1, 5, 4, 6, 2, 4, 3]
    assert len(set(pairwise(text))) > len(set(text))
    return overfitted_model(text, vocab_size=8), text


def test_an_overfitted_model_accepts_almost_all_drafts(overfitted: tuple[RecycleGPT, list[int]]) -> None:
    """Prevents wrong states or positions in drafting, at any depth, which verification would correct and hide."""
    model, text = overfitted
    decoder = Decoder(model)
    trials, hits = [0, 0, 0], [0, 0, 0]
    for start in range(0, len(text), 3):
        prompt = (text * 3)[start : start + 16]
        generation = decoder.generate(prompt, "verified", max_new_tokens=28, draft_tokens=3)
        assert generation.token_ids == tuple((text * 4)[start + 16 : start + 44])
        for position in range(3):
            trials[position] += generation.tested[position]
            hits[position] += generation.accepted[position]
    assert hits[0] / trials[0] >= 0.95
    assert hits[1] / trials[1] >= 0.9
    assert hits[2] / trials[2] >= 0.9


def test_unverified_tokens_of_an_overfitted_model_are_correct(overfitted: tuple[RecycleGPT, list[int]]) -> None:
    """Prevents `alternate` from feeding the backbone tokens or positions other than those it kept."""
    model, text = overfitted
    for drafts in (1, 2):
        generation = Decoder(model).generate(text, "alternate", max_new_tokens=29, draft_tokens=drafts)
        assert generation.token_ids == tuple((text * 3)[16:45])


def test_the_adaptive_length_uses_accurate_drafts(overfitted: tuple[RecycleGPT, list[int]]) -> None:
    """Prevents an adaptation that never drafts although every draft is correct and, by the given clock, cheap."""
    model, text = overfitted
    ticks = iter(range(1_000_000))
    decoder = Decoder(model, clock=lambda: float(next(ticks)))  # every interval looks like one second
    tokens = [decoder.generate(text, "verified", max_new_tokens=28).tokens_per_full_call for _ in range(3)]
    assert tokens[-1] > 1.5
