"""A file of prompts, split over processes that start and stop independently."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.portable.manifest import write_manifest
from recycle_ds.inference.batch.parts_record import checkpoint_digest
from recycle_ds.inference.errors import DecodingError
from tests.unit.inference.prompt_files import Loaded, continuation, model_of, result, settle, share, work


def test_every_prompt_once_and_in_order_after_restarts(prompts: Path) -> None:
    """Prevents lost or repeated prompts after a restart with another number of processes, or a kill within a line."""
    assert not work(share(prompts, 0, 3), most=2)
    assert not work(share(prompts, 2, 3))
    part = prompts.with_name("out.jsonl.parts") / "part-00000-of-00003.jsonl"
    part.write_text(part.read_text() + '{"prompt": "p6", "te')  # cut off by a kill
    assert not work(share(prompts, 0, 2))
    assert not work(share(prompts, 0, 3)), "its own partial line must not become the start of another"
    assert work(share(prompts, 1, 2))
    assert [
        (line["prompt"], line["id"], line["text"], line["index"], line["new_tokens"]) for line in result(prompts)
    ] == [(f"p{n}", n * 7, f"p{n}!", n, n) for n in range(11)]
    assert not prompts.with_name("out.jsonl.parts").exists()


def test_progress_counts_what_earlier_starts_have_done(prompts: Path) -> None:
    """Prevents a restart that seems to begin anew, and two starts that look to a batch job as if nothing was done between."""
    assert not work(share(prompts, 0, 2), most=2)
    shown: list[tuple[int, int]] = []
    again = share(prompts, 0, 2)
    settle(again)
    assert not again.work(continuation, lambda: False, lambda *counts: shown.append(counts))
    assert shown == [(3, 6), (4, 6), (5, 6), (6, 6)]


def test_other_settings_are_not_mixed_in(prompts: Path) -> None:
    """Prevents an output of which half was generated with another model or another temperature."""
    work(share(prompts, 0, 2))
    with pytest.raises(DecodingError, match="created with other prompts or settings"):
        work(share(prompts, 1, 2, mode="alternate"))
    assert work(share(prompts, 1, 2))
    assert work(share(prompts, 1, 4)), "a late process finds the completed output"
    with pytest.raises(DecodingError, match="already exists"):
        work(share(prompts, 0, 1, mode="alternate"))


def test_separators_inside_a_text_are_no_line_ends(tmp_path: Path) -> None:
    """Prevents a prompt or a continuation from being cut at a character that some functions treat as a line end."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x0bc"}, ensure_ascii=False) + "\n")
    assert work(share(path, 0, 1))
    assert json.loads(path.with_name("out.jsonl").read_text())["text"] == "a\u2028b\x0bc!"


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """A checkpoint of a run, without weights."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    counts = dict.fromkeys(("step", "next_sample", "skipped", "rollbacks", "adam_step"), step)
    empty: dict[str, Any] = {name: {} for name in ("config", "layout", "provenance", "tensors", "files")}
    write_manifest(folder, {**counts, "recent": [], "data": {"tokenizer": "t", "train": []}, **empty})
    return folder


def test_a_running_training_is_one_model(prompts: Path, tmp_path: Path) -> None:
    """Prevents an output of two models, because the run named by --model saved between two starts or two ranks."""
    run = tmp_path / "run"
    first = checkpoint_of(run, 5)
    assert settle(share(prompts, 0, 2, model=run)) == str(first)
    checkpoint_of(run, 10)
    assert settle(share(prompts, 1, 2, model=run)) == str(first), "a later start, or a rank that starts later"
    assert settle(share(prompts, 1, 2, model=first)) == str(first), "the same checkpoint, by its own path"
    with pytest.raises(DecodingError, match=f"not with {tmp_path}/model: use --model {first}, or"):
        settle(share(prompts, 0, 2))
    shutil.rmtree(first)
    with pytest.raises(
        DecodingError, match=f"checkpoint {first}, which no longer exists: .*remove .*parts to start over"
    ):
        settle(share(prompts, 0, 2, model=run))


def test_ranks_that_start_at_the_same_time_agree(prompts: Path, tmp_path: Path) -> None:
    """Prevents two ranks of the first start from using different newest checkpoints, as the run saves between them."""
    run, second, asked = tmp_path / "run", share(prompts, 1, 2, model=tmp_path / "run"), []
    first = checkpoint_of(run, 5)

    def slow(path: str) -> Loaded:
        asked.append(path)
        if len(asked) == 1:
            assert settle(share(prompts, 0, 2, model=run)) == str(first), "the faster rank"
            return Loaded(checkpoint_of(run, 10))
        return Loaded(Path(path))

    loaded = second.settle(slow)
    assert loaded is not None and loaded.path == first
    assert asked == [str(run), str(first)]


def test_replaced_weights_are_detected(prompts: Path, tmp_path: Path) -> None:
    """Prevents mixing outputs of replaced weights, and refusing a copy of the same model on another node's disk."""
    one = share(prompts, 0, 2)
    settle(one)
    os.utime(Path(one.model) / "model.safetensors", (1, 1))
    settle(one)
    model_of(Path(one.model), "weightz")
    with pytest.raises(
        DecodingError, match=r"whose files have changed since.*: restore them, or remove .* to start over"
    ):
        settle(one)


def test_the_digest_of_a_large_file_covers_both_ends_and_the_middle(tmp_path: Path) -> None:
    """Prevents different weights from having the same digest because only their first bytes are read."""
    path = tmp_path / "model.safetensors"
    content = bytearray(2**24 + 12345)
    digests = []
    for offset in (None, 0, len(content) // 2, len(content) - 1):
        if offset is not None:
            content[offset : offset + 100] = b"x" * len(content[offset : offset + 100])
        path.write_bytes(content)
        digests.append(checkpoint_digest(tmp_path))
    assert len(set(digests)) == 4


def test_a_late_process_loads_no_model(prompts: Path) -> None:
    """Prevents a rank with nothing to do from loading a model, finding the parts removed, and starting over."""
    assert not work(share(prompts, 1, 2))

    def load_while_finishing(path: str) -> Loaded:
        assert work(share(prompts, 0, 2))
        return Loaded(Path(path))

    late = share(prompts, 1, 2)
    assert late.settle(load_while_finishing) is None
    assert not late.parts.exists() and len(result(prompts)) == 11
    assert late.settle(lambda path: pytest.fail("loaded")) is None


def test_the_parts_are_removed_while_a_rank_starts(prompts: Path) -> None:
    """Prevents an error of a rank with nothing left to do because another rank has just written the output."""
    one, late = share(prompts, 0, 1), share(prompts, 1, 2)
    settle(one)
    settle(late)
    assert one.work(continuation, lambda: False, lambda *_: None)
    assert late.work(continuation, lambda: False, lambda *_: None)
    assert not late.parts.exists() and len(result(prompts)) == 11


def test_what_killed_writers_left_is_removed(prompts: Path) -> None:
    """Prevents copies of large outputs that stay hidden for ever, and the removal of another output's."""
    left = ["out.jsonl", "out.jsonl.errors.jsonl", "out.jsonl.parts", "other-out.jsonl"]
    for name in left:
        prompts.with_name(f".tmp-12-0123abcd-{name}").write_text("cut o")
    assert work(share(prompts, 0, 1))
    assert [path.name for path in prompts.parent.glob(".tmp-*")] == [".tmp-12-0123abcd-other-out.jsonl"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (".", "is a folder"),
        ("prompts.jsonl/out.jsonl", "its folder cannot be created"),
        ("/proc/nowhere/out.jsonl", "its folder cannot be created"),
        ("file", "file.parts: not a writable folder"),
        ("odd", "odd.parts: not a folder of partial outputs"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_at_once(prompts: Path, output: str, words: str) -> None:
    """Prevents a stack trace instead of an output after all prompts were continued."""
    prompts.with_name("file.parts").touch()
    prompts.with_name("odd.parts").mkdir()
    (prompts.with_name("odd.parts") / "something").touch()
    one = replace(share(prompts, 0, 1), output=prompts.parent / output)
    with pytest.raises(DecodingError, match=words):
        settle(one)


def test_an_unrelated_file_is_not_overwritten(prompts: Path) -> None:
    """Prevents overwriting a user's file because a parts folder exists next to it."""
    one = share(prompts, 0, 1)
    settle(one)
    one.output.write_text("precious")
    with pytest.raises(DecodingError, match="already exists; name another --output, or remove it"):
        settle(one)
    assert one.output.read_text() == "precious"
