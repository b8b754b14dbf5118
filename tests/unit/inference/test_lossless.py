"""`verified` against `autoregressive`: the same tokens at temperature 0, the same distribution above 0."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.inference import Decoder
from recycle_ds.inference.parameters import TokenSampling
from tests.unit.inference.engine.requests import free_drafts
from tests.unit.inference.models import LETTERS, Letters, agreement, joint_distribution, random_model


@given(
    vocab_size=st.sampled_from([3, 5, 11]),
    seed=st.integers(0, 2),
    layers=st.integers(1, 2),
    recycle_layers=st.integers(1, 2),
    max_positions=st.sampled_from([13, 48]),
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    max_new_tokens=st.integers(1, 30),
    draft_tokens=st.one_of(st.none(), st.integers(0, 7)),
    eos=st.sets(st.integers(0, 10), max_size=2),
    penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    stop=st.lists(st.text(LETTERS[:5], min_size=1, max_size=3), max_size=2),
)
def test_verified_is_autoregressive_token_for_token(
    vocab_size: int,
    seed: int,
    layers: int,
    recycle_layers: int,
    max_positions: int,
    prompt: list[int],
    max_new_tokens: int,
    draft_tokens: int | None,
    eos: set[int],
    penalty: float,
    stop: list[str],
) -> None:
    """Prevents any difference at limits, stop tokens, stop strings, with penalties, with every draft length and with trees."""
    model = random_model(vocab_size, seed, layers=layers, recycle_layers=recycle_layers, max_positions=max_positions)
    decoder = Decoder(model, eos, Letters)
    free_drafts(decoder.engine)
    params = TokenSampling(repetition_penalty=penalty)
    seen: list[int] = []
    expected = decoder.generate(prompt, "autoregressive", params, max_new_tokens=max_new_tokens, stop=stop)
    found = decoder.generate(
        prompt,
        "verified",
        params,
        max_new_tokens=max_new_tokens,
        draft_tokens=draft_tokens,
        stop=stop,
        on_tokens=lambda ids, recycled: seen.extend(ids),
    )
    assert found.token_ids == expected.token_ids == tuple(seen)
    assert found.finish_reason == expected.finish_reason
    assert expected.module_calls == 0 and expected.full_calls == len(expected.token_ids)


def test_a_penalty_sees_the_drafts_before_each_position() -> None:
    """Prevents verifying a draft without the drafts accepted before it, in the same call, in its history."""
    accepted = 0
    for seed, std, penalty in product(range(3), (0.1, 0.3), (1.3, 2.5)):
        decoder, params = Decoder(random_model(6, seed, std=std)), TokenSampling(repetition_penalty=penalty)
        for token in range(6):  # a short prompt: in the first cycles, most tokens are not in the history yet
            expected = decoder.generate([token], "autoregressive", params, max_new_tokens=9)
            found = decoder.generate([token], "verified", params, max_new_tokens=9, draft_tokens=4)
            assert found.token_ids == expected.token_ids
            accepted += sum(found.accepted[1:])
    assert accepted > 0, "the test needs a draft accepted after another"


def test_the_property_test_covers_accepted_and_rejected_drafts() -> None:
    """Prevents the property test from passing because all drafts of the random models are rejected, or all accepted."""
    tested, accepted, recycled, full = 0, 0, 0, 0
    for seed in range(3):
        generation = Decoder(random_model(5, seed)).generate([1, 2], max_new_tokens=40, draft_tokens=3)
        tested += sum(generation.tested)
        accepted += sum(generation.accepted)
        recycled += sum(generation.recycled)
        full += generation.full_calls
    assert 0.1 < accepted / tested < 0.95
    assert accepted == recycled
    assert recycled + full == 3 * 40


@pytest.mark.parametrize(("mode", "trials"), [("autoregressive", 500), ("verified", 900)])
@pytest.mark.parametrize("seeded", [True, False])
def test_sampled_text_has_the_models_joint_distribution(
    mode: str, trials: int, seeded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents sampling that is biased by its drafts, across positions, filters and penalties: with a seed, whose drafts
    must equal the target's own choice, and without, where drafts are rejected by their probability."""
    model = random_model(3, 0, layers=1, std=0.2)
    prompt, params = [1], TokenSampling(0.9, top_p=0.95, min_p=0.05, repetition_penalty=1.2)
    joint = joint_distribution(model, prompt, params, count=4)
    decoder = Decoder(model)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = tested = 0
    for seed in range(trials):
        monkeypatch.setattr("recycle_ds.inference.engine.engine.secrets.randbelow", lambda _, own=seed: own)
        sampling = replace(params, seed=seed if seeded else None)
        generation = decoder.generate(prompt, mode, sampling, max_new_tokens=4, draft_tokens=2)
        counts[generation.token_ids] += 1
        accepted, tested = accepted + sum(generation.accepted), tested + sum(generation.tested)
    assert agreement(counts, joint) > 1e-4
    if mode == "verified":
        assert 0.2 < accepted / tested < 0.98, "the test needs accepted and rejected drafts"


@pytest.mark.parametrize("draft_tokens", [None, 3])
@pytest.mark.parametrize("mode", ["autoregressive", "alternate", "verified"])
def test_a_seed_repeats_a_sample(mode: str, draft_tokens: int | None) -> None:
    """Prevents samples that depend on timing, on an earlier generation, or on another stream's random numbers."""
    model = random_model(11, 1)
    params = TokenSampling(temperature=1.0, seed=7)
    decoder = Decoder(model)
    first = decoder.generate([1, 2, 3], mode, params, max_new_tokens=30, draft_tokens=draft_tokens)
    decoder.generate([4], "verified", TokenSampling(1.0), max_new_tokens=9)
    torch.rand(3)
    again = decoder.generate([1, 2, 3], mode, params, max_new_tokens=30, draft_tokens=draft_tokens)
    other = decoder.generate([1, 2, 3], mode, TokenSampling(1.0, seed=8), max_new_tokens=30, draft_tokens=draft_tokens)
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids


def test_drafts_do_not_touch_the_global_random_numbers() -> None:
    """Prevents decoding (for example of a validation sample) from changing the training run that it is part of."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Decoder(random_model(5, 1)).generate([1], "verified", TokenSampling(1.0), max_new_tokens=9, draft_tokens=2)
    assert torch.equal(torch.rand(3), expected)
