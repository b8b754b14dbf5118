"""Drafts against a computation from scratch, and acceptance of an overfitted model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from recycle_ds.inference import Decoder, SamplingParams
from recycle_ds.inference.engine.sequence import Sequence
from recycle_ds.inference.speculation.cost_model import CostModel
from recycle_ds.model import RecycleGPT
from tests.unit.inference.models import drafts_from_scratch, next_logits, overfitted_model, random_model


def steps(decoder: Decoder, prompt: list[int], params: SamplingParams) -> Iterator[Sequence]:
    """Decodes in verified mode, step by step."""
    (sequence,) = decoder.engine.add(prompt, params, "verified")
    while sequence.ended_at is None:
        decoder.engine.step()
        yield sequence


@pytest.mark.parametrize("recycle_layers", [1, 2])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_drafts_are_those_of_a_computation_from_scratch(recycle_layers: int, penalty: float) -> None:
    """Prevents stale entries of rejected drafts, shifted positions and wrong states, which verification would hide."""
    model = random_model(8, 5, recycle_layers=recycle_layers)
    params = SamplingParams(max_new_tokens=36, draft_tokens=3, repetition_penalty=penalty)
    compared, accepted = 0, 0
    for sequence in steps(Decoder(model), [1, 2, 3, 4], params):
        expected = drafts_from_scratch(model, sequence.tokens, len(sequence.drafts), penalty)
        assert list(sequence.drafts) == expected
        compared, accepted = compared + len(expected), sum(sequence.tally.accepted)
    assert 0 < accepted < compared, "the test needs accepted and rejected drafts"


def test_positions_skipped_without_drafts_are_read_later() -> None:
    """Prevents gaps in the module's KV cache after steps without drafts, also over more slots than are read at once."""
    model = random_model(8, 6, max_positions=700)
    decoder = Decoder(model)
    prompt = [1, 2, 3] * 190
    (sequence,) = decoder.engine.add(prompt, SamplingParams(max_new_tokens=30, draft_tokens=0), "verified")
    for _ in range(6):
        decoder.engine.step()
    assert sequence.module_calls == 0
    sequence.params = replace(sequence.params, draft_tokens=3)
    decoder.engine.step()
    assert list(sequence.drafts) == drafts_from_scratch(model, sequence.tokens, 3)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_alternate_keeps_the_tokens_of_the_module(count: int) -> None:
    """Prevents the paper's mode from reading states, tokens or positions other than those of the text it keeps."""
    model = random_model(8, 7)
    expected = [1, 2, 3]
    while len(expected) < 3 + 20:
        expected.append(int(next_logits(model, expected).argmax()))
        expected += drafts_from_scratch(model, expected, count)
    found = Decoder(model).generate([1, 2, 3], "alternate", max_new_tokens=20, draft_tokens=count)
    assert list(found.token_ids) == expected[3:23]
    assert found.recycled == tuple(i % (count + 1) > 0 for i in range(20))


def test_drafting_stops_at_a_drafted_end_of_sequence() -> None:
    """Prevents module calls for tokens that can never be kept."""
    model = random_model(4, 9)
    params = SamplingParams(max_new_tokens=20, draft_tokens=8)
    unlimited = next(steps(Decoder(model), [1, 2, 3], params))
    assert len(unlimited.drafts) == 8 and unlimited.drafts[0] not in unlimited.tokens[3:]
    limited = next(steps(Decoder(model, unlimited.drafts[0]), [1, 2, 3], params))
    assert limited.drafts == unlimited.drafts[:1]


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
    """Prevents an adaptation that never drafts although every draft is correct and, by the given costs, cheap."""
    model, text = overfitted
    decoder = Decoder(model)
    decoder.engine.use_costs(CostModel(full=((1, 1.0), (8, 1.1)), module=((1, 0.05),)))
    tokens = [decoder.generate(text, "verified", max_new_tokens=28).tokens_per_full_call for _ in range(3)]
    assert tokens[-1] > 1.5
