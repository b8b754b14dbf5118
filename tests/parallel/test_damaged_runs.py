"""Restarts of real runs with a broken checkpoint: an exact resume from an older one, or an error of one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint import load_model
from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import digest_of
from recycle_ds.config import RunConfig
from recycle_ds.data.prepare import prepare
from recycle_ds.data.tokenizer import Tokenizer
from tests.distributed import run_in_sets, run_ranks
from tests.parallel.ranks import run_all, run_own, run_quietly
from tests.runs import figures, make_corpus, tiny_run, zero
from tests.unit.checkpoint.test_fuzz import change_bytes, change_files, change_json

MUTATIONS = 90 if os.environ.get("RECYCLE_TEST_ALL") == "1" else 30
TOGETHER = 15


def config(root: Path, name: str, **changes: Any) -> RunConfig:
    return tiny_run(
        root / "corpus", root / name, training__steps=6, training__save_every=2, deepspeed=zero(1), **changes
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/: a run of six steps. parts/: its first four steps, with checkpoints of steps 2 and 4."""
    root = tmp_path_factory.mktemp("damaged")
    make_corpus(root / "corpus")
    runs = [config(root, "whole"), config(root, "parts", training__stop_at=4)]
    assert run_ranks(run_all, 1, runs, timeout=120) == [["finished", "stop_at"]]
    return root


def broken(root: Path, name: str, mutate: Callable[[Path, random.Random], None], draw: random.Random) -> Path:
    """Copies parts/ and mutates its newest checkpoint, whose path is returned."""
    shutil.copytree(root / "parts", root / name)
    newest = completed(root / name)[0]
    mutate(newest, draw)
    return newest


def run_many(runs: list[RunConfig]) -> list[tuple[str, str]]:
    """Runs them, in batches of TOGETHER per process to limit memory. Returns how each ended, and what it printed."""
    return run_in_sets(run_quietly, 1, runs, size=TOGETHER)[0]


def test_a_broken_checkpoint_never_changes_a_run(root: Path) -> None:
    """Prevents moments, generators or positions read from a damaged file, and a restart that ends in a traceback."""
    draw = random.Random(29)
    names = []
    for number in range(MUTATIONS):
        names.append(f"broken-{number}")
        broken(root, names[-1], (change_json, change_bytes, change_files)[number % 3], draw)
    endings = run_many([config(root, name) for name in names])
    fell_back = 0
    for name, (ending, output) in zip(names, endings, strict=True):
        assert ending == "finished", (name, ending)
        fell_back += "falling back" in output
        assert figures(root / name) == figures(root / "whole"), f"{name}: differs from the uninterrupted run"
    assert fell_back > MUTATIONS / 2


def test_a_wrong_manifest_with_a_valid_digest_is_refused(root: Path) -> None:
    """Prevents a KeyError or TypeError for a manifest of another program, possibly after weights were changed."""
    draw = random.Random(31)
    runs = []
    for number in range(MUTATIONS):
        path = broken(root, f"signed-{number}", change_json, draw) / "manifest.json"
        try:
            tree = json.loads(path.read_text())
        except ValueError:
            continue
        path.write_text(json.dumps(tree | {"digest": digest_of(tree)}))
        runs.append(config(root, f"signed-{number}"))
    endings = run_many(runs)
    for ending, _ in endings:
        assert ending == "finished" or (ending.startswith("error: ") and "\n" not in ending), ending
    assert any("falling back" in output for _, output in endings)


def test_hosts_with_other_files(tmp_path: Path) -> None:
    """Prevents ranks that build models of different sizes and hang, or train on different data, because a host has an older
    copy of them."""
    first = make_corpus(tmp_path / "first")
    wider, other = tmp_path / "wider", make_corpus(tmp_path / "other", seed=6)
    prepare(str(first / "texts.jsonl"), wider, _widened(first, wider), validation_fraction=0.1, workers=1)
    for copy in (wider, other):
        runs = [tiny_run(corpus, tmp_path / f"run-{copy.name}") for corpus in (first, copy)]
        ending, same = run_ranks(run_own, 2, runs, timeout=120)
        assert ending == same
        assert ending.startswith(
            f"error: data.tokenizer ({runs[1].data.tokenizer}) or the token files of data.train are other "
        )
        assert "(rank 1 on " in ending


def _widened(corpus: Path, folder: Path) -> Tokenizer:
    """A corpus's tokenizer with one more token, in another folder."""
    tree = json.loads((corpus / "tokenizer.json").read_text())
    tree["added_tokens"].append(tree["added_tokens"][0] | {"id": 300, "content": "<|turn|>"})
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return Tokenizer.load(folder)


def test_a_checkpoint_keeps_the_end_token(tmp_path: Path) -> None:
    """Prevents a checkpoint that loses the end token if only tokenizer_config.json names it."""
    corpus = make_corpus(tmp_path / "plain")
    chat = tmp_path / "chat"
    chat.mkdir()
    tree = json.loads((corpus / "tokenizer.json").read_text())
    tree["added_tokens"].append(tree["added_tokens"][0] | {"id": 300, "content": "<|turn|>"})
    (chat / "tokenizer.json").write_text(json.dumps(tree))
    (chat / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|turn|>"}))
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = Tokenizer.load(chat)
    assert tokenizer.eos_id == 300
    prepare(str(corpus / "texts.jsonl"), chat, tokenizer, validation_fraction=0.1, workers=1)
    run = tiny_run(chat, tmp_path / "run", training__steps=1)
    assert run_ranks(run_all, 1, [run], timeout=120) == [["finished"]]
    shutil.rmtree(chat)
    assert load_model(str(tmp_path / "run")).tokenizer.eos_id == 300
    assert (completed(tmp_path / "run")[0] / "chat_template.jinja").read_text() == "{{ messages }}"
