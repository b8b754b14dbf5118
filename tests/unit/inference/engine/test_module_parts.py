"""Decoding with the module's optional parts: tapped states in its input, and a confidence layer."""

from __future__ import annotations

import pytest
import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.inference import SamplingParams
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.model import build_model
from tests.unit.inference.engine.requests import check_answers, decode_alone, decode_together, memory_of, requests
from tests.unit.inference.models import drafts_from_scratch, random_model, spread_added

TAPS = (0, 2)


@pytest.mark.parametrize("seed", range(2))
def test_drafts_are_those_of_training(seed: int) -> None:
    """Prevents a module that decodes with other tapped states than it was trained with."""
    model = random_model(7, seed, layers=3, max_positions=96, std=0.3, taps=TAPS)
    engine = local_engine(model, max_batch=1)
    (sequence,) = engine.add([1, 2, 3], SamplingParams(max_new_tokens=24, draft_tokens=3), "verified")
    compared = 0
    while sequence.ended_at is None:
        engine.step()
        if sequence.drafts:
            compared += 1
            assert list(sequence.drafts) == drafts_from_scratch(model, sequence.tokens, len(sequence.drafts))
    assert compared > 5


def test_answers_do_not_depend_on_taps() -> None:
    """Prevents tapped states from reaching the head, and shared or preempted blocks without them."""
    model = random_model(7, 1, layers=3, max_positions=96, std=0.3, taps=TAPS)
    engine = local_engine(model, max_batch=12, kv_memory_gib=memory_of(model, 9))
    asked = requests(48, vocabulary=7, seed=1)
    found = decode_together(engine, asked)
    assert engine.scheduler.preemptions > 0, "the test needs preemptions"
    check_answers(asked, found, decode_alone(model, asked))
    assert sum(sum(one.accepted) for one in found) > 10, "the test needs accepted drafts"


def test_the_cache_keeps_what_taps_add() -> None:
    """Prevents a cache of all tapped states: one more state for each position is enough."""
    plain, tapped = (StageWeights(random_model(7, 1, layers=3, taps=taps)) for taps in ((), (0, 1, 2)))
    width = plain.width
    assert (plain.kept_width, tapped.kept_width, tapped.received_width) == (width, 2 * width, width)
    assert Cache.bytes_per_block(tapped, 16) - Cache.bytes_per_block(plain, 16) == 16 * width * 4


def test_the_confidence_layer_decides_on_drafts() -> None:
    """Prevents a draft budget that ignores the trained confidence, or asks it about another state."""
    config = ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=7, max_positions=96, init_std=0.3)
    model = spread_added(build_model(config, RecycleConfig(layers=1, depth=2, confidence=True), seed=1).eval())
    engine = local_engine(model, max_batch=1)
    (sequence,) = engine.add([1, 2, 3], SamplingParams(max_new_tokens=24, draft_tokens=2), "verified")
    compared = 0
    while sequence.ended_at is None:
        engine.step()
        if len(sequence.drafts) == 2:
            read = torch.tensor([*sequence.tokens, *sequence.drafts])
            length = len(sequence.tokens) - 1
            inputs = torch.stack([read[k : k + length] for k in range(3)])[:, None]
            positions, documents = torch.arange(length)[None], torch.zeros(1, length, dtype=torch.int64)
            states = model.states(Batch(inputs[0], positions, documents, inputs, inputs))
            assert model.recycle is not None and model.recycle.confidence is not None
            expected = [float(model.recycle.confidence(states[k][-1, 0]).sigmoid()) for k in (1, 2)]
            assert sequence.confidences == pytest.approx(expected, abs=1e-5)
            compared += 1
    assert compared > 5
