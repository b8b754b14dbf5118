"""Models with more ids than their tokenizer: an id without a token is never sampled, and speculation stays lossless."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.loading import LoadedModel, load_model
from recycle_ds.config import ModelConfig, RecycleConfig, RopeConfig
from recycle_ds.inference import Decoder
from recycle_ds.inference.engine.build import local_engine, team_engine
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.team import build_team
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.loading import decoder_of, engine_of
from recycle_ds.inference.parameters import SamplingParams, TokenSampling
from recycle_ds.model import RecycleGPT, build_model
from tests.distributed import run_ranks
from tests.in_the_wild.folders import byte_tokenizer, edit_tensors, theirs
from tests.unit.checkpoint.families import save
from tests.unit.inference.models import agreement, next_logits

MODES = ("autoregressive", "alternate", "verified")
HOLE, TOKENS = 40, 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 ids and a tokenizer of 257 with a hole. The head's rows without a token are the largest."""
    found = tmp_path_factory.mktemp("padded")
    save("llama", found / "hf")
    head = load_file(found / "hf" / "model.safetensors")["lm_head.weight"]
    head[[HOLE, *range(TOKENS, 300)]] *= 5
    edit_tensors(found / "hf", {"lm_head.weight": head})
    byte_tokenizer(found / "hf", hole=HOLE)
    convert(str(found / "hf"), str(found / "portable"), Conversion("portable", recycle_layers=1))
    return found


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder / "portable"))


def test_greedy_tokens_are_the_best_that_have_a_token(folder: Path, loaded: LoadedModel) -> None:
    """Prevents ids that decode to nothing, which an untrained row of the head may win."""
    prompt, real = [1, 2, 3], sorted(loaded.tokenizer.token_ids)
    assert (len(real), loaded.tokenizer.vocab_size, loaded.model.vocab_size) == (256, TOKENS, 300)
    tokens, padding = list(prompt), 0
    for _ in range(20):
        logits = theirs(folder / "hf", torch.tensor([tokens]))[0, -1]
        padding += int(logits.argmax()) not in loaded.tokenizer.token_ids
        tokens.append(real[int(logits[real].argmax())])
    assert padding > 10, "the test needs positions whose largest logit has no token"
    decoder = decoder_of(loaded)
    for mode in ("autoregressive", "verified"):
        found = decoder.generate(prompt, mode, max_new_tokens=20, draft_tokens=None if mode == "autoregressive" else 3)
        expected = tokens[3:]
        assert list(found.token_ids) == expected[: len(found.token_ids)]
        assert len(found.token_ids) == 20 or found.finish_reason == "eos"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [None, 7])
def test_no_mode_samples_them(loaded: LoadedModel, mode: str, seed: int | None) -> None:
    """Prevents a filter, a penalty, a bias or a draft from bringing an id without a token back."""
    engine = engine_of(loaded, 4, None)
    for params in (
        SamplingParams(max_new_tokens=20, temperature=2.0, seed=seed, ignore_eos=True),
        SamplingParams(max_new_tokens=20, temperature=1.5, seed=seed, top_k=280, top_p=0.99, min_p=0.001),
        SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed, repetition_penalty=1.3, presence_penalty=1.0),
        SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed, logit_bias=((HOLE, 100.0), (299, 100.0))),
    ):
        (answer,) = engine.add([1, 2, 3], params, mode)
        engine.finish([answer])
        assert answer.ended_at is not None
        assert set(answer.generation(answer.ended_at).token_ids) <= loaded.tokenizer.token_ids


def test_requests_that_leave_no_token() -> None:
    """Prevents a distribution of zeros, which would be sampled as if it were uniform."""
    engine = local_engine(small_model(), max_batch=1)
    with pytest.raises(DecodingError, match="no token is left to choose"):
        engine.add([1], SamplingParams(max_new_tokens=2, allowed_tokens=(1, 5)), "autoregressive")
    with pytest.raises(DecodingError, match="logprobs=4: the model's vocabulary has 3 tokens"):
        engine.add([1], SamplingParams(max_new_tokens=2, logprobs=4), "autoregressive")
    (answer,) = engine.add([1], SamplingParams(max_new_tokens=1, logprobs=3), "autoregressive")
    engine.finish([answer])
    assert answer.ended_at is not None
    ((_, pairs),) = answer.generation(answer.ended_at).logprobs
    assert {token for token, _ in pairs} == {0, 2, 3}


def small_model() -> RecycleGPT:
    """A model of 6 ids, of which 1, 4 and 5 have no token."""
    config = ModelConfig(layers=1, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=6, max_positions=48, init_std=0.2)
    model = build_model(config, RecycleConfig(layers=1), seed=0).eval()
    model.unnamed_ids = (1, 4, 5)
    return model


@pytest.mark.parametrize("seeded", [True, False])
def test_verified_text_has_the_distribution_over_real_tokens(seeded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents drafts drawn from another vocabulary than the one that they are verified with: sampling would be biased."""
    model, real = small_model(), (0, 2, 3)
    joint = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, chance in joint.items():
            probs = next_logits(model, [0, *tokens])[list(real)].softmax(-1).tolist()
            longer |= {(*tokens, token): chance * p for token, p in zip(real, probs, strict=True)}
        joint = longer
    joint |= {tokens: 0.0 for tokens in product(range(6), repeat=3) if tokens not in joint}
    decoder = Decoder(model)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = tested = 0
    for seed in range(700):
        monkeypatch.setattr("recycle_ds.inference.engine.engine.secrets.randbelow", lambda _, own=seed: own)
        params = TokenSampling(1.0, seed=seed if seeded else None)
        generation = decoder.generate([0], "verified", params, max_new_tokens=3, draft_tokens=2)
        counts[generation.token_ids] += 1
        accepted, tested = accepted + sum(generation.accepted), tested + sum(generation.tested)
    assert agreement(counts, joint) > 1e-4
    assert 0.2 < accepted / tested < 0.98, "the test needs accepted and rejected drafts"


def _serve(rank: int, world_size: int) -> list[tuple[int, ...]] | None:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    team = build_team(2, 1, torch.device("cpu"))
    model = build_model(CONFIG, RecycleConfig(layers=1), team.mesh, seed=5).eval()
    model.unnamed_ids = UNNAMED
    engine = team_engine(model, team, max_batch=4)
    return None if engine is None else _decode(engine)


def _decode(engine: DecodingEngine) -> list[tuple[int, ...]]:
    answers = []
    for temperature, mode in product((0.0, 1.0), ("autoregressive", "verified")):
        params = SamplingParams(max_new_tokens=20, temperature=temperature, seed=3, draft_tokens=2)
        answers += engine.add([1, 2], params, mode)
    engine.finish(answers)
    engine.close()
    return [answer.generation(answer.ended_at).token_ids for answer in answers if answer.ended_at is not None]


CONFIG = ModelConfig(
    layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=11, vocab_multiple=4, max_positions=96, init_std=0.6,
    head_dim=8, qk_norm=True, rope=RopeConfig(unrotated_layers=(1,)),
)  # fmt: skip
UNNAMED = (3, *range(8, 11))
"""All ids of the second tensor rank, and one of the first."""


def test_tensor_ranks_agree() -> None:
    """Prevents a rank whose ids have no tokens from winning, indices of the wrong shard, and norms of the wrong heads."""
    model = build_model(CONFIG, RecycleConfig(layers=1), seed=5).eval()
    free = _decode(local_engine(model, max_batch=4))
    assert any(set(UNNAMED) & set(tokens) for tokens in free), "the test needs ids without a token that would win"
    model.unnamed_ids = UNNAMED
    expected = _decode(local_engine(model, max_batch=4))
    assert not any(set(UNNAMED) & set(tokens) for tokens in expected)
    assert expected[0] == expected[1] and expected[2] == expected[3]
    (found,) = [tokens for tokens in run_ranks(_serve, 2) if tokens is not None]
    assert found == expected
