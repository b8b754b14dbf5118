"""A tiny model overfitted on a repeating text: its acceptance shows errors that verification would hide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ds.checkpoint import load_model
from recycle_ds.data.prepare import prepare
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.evaluation.perplexity import evaluate_documents
from recycle_ds.inference.loading import decoder_of
from tests.distributed import run_ranks
from tests.parallel.ranks import run_all
from tests.runs import read_metrics, tiny_run

TEXT = "the quick brown fox jumps over the lazy dog while seven wise owls quietly judge "


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 120 steps on one sentence repeated."""
    root = tmp_path_factory.mktemp("overfit")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": TEXT * 12}) + "\n" for _ in range(24)))
    tokenizer = Tokenizer.train(iter([TEXT * 12]), 280)
    tokenizer.save(root)
    prepare(str(root / "texts.jsonl"), root, tokenizer, validation_fraction=0.1, workers=1)
    config = tiny_run(
        root, root / "run", training__steps=120, training__seq_length=96, training__learning_rate=4e-3,
        training__warmup_steps=20, training__eval_every=120, training__log_every=40, recycle__depth=3,
        model__max_positions=256,
    )  # fmt: skip
    assert run_ranks(run_all, 1, [config], timeout=200) == [["finished"]]
    return root / "run"


def test_acceptance_of_an_overfitted_model(run_dir: Path) -> None:
    """Prevents wrong states, tokens or positions in the module's training, which verification would hide."""
    evaluation = next(record for record in read_metrics(run_dir) if "eval_acceptance" in record)
    assert evaluation["eval_acceptance"][0] >= 0.95
    loaded = load_model(str(run_dir))
    result = evaluate_documents(loaded.model, [loaded.tokenizer.encode(TEXT * 12)], loaded.tokenizer.eos_id, 96, 4)
    assert result.acceptance[0] >= 0.95 and result.perplexity < 1.5


def test_decoding_accepts_and_stays_identical(run_dir: Path) -> None:
    """Prevents offsets or caches that differ from training: drafts would be rejected, or the text would change."""
    loaded = load_model(str(run_dir))
    decoder = decoder_of(loaded)
    prompt = loaded.tokenizer.encode(TEXT.strip())
    reference = decoder.generate(prompt, "autoregressive", max_new_tokens=48)
    verified = decoder.generate(prompt, "verified", max_new_tokens=48, draft_tokens=3)
    assert verified.token_ids == reference.token_ids
    assert verified.acceptance[0] >= 0.95
    assert verified.full_calls < reference.full_calls / 2
    assert loaded.tokenizer.decode(reference.token_ids).strip().startswith("the quick brown fox")
