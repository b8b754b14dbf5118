"""The generate command with a file of prompts, as a job of several ranks runs it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.unit.inference.command import PROMPT, Generate

FIGURES = r"[\d,]+\.\d tokens/s(, acceptance \d\.\d\d)?"
"""What a line of progress ends with."""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a batch job. This process is the second of its two ranks."""
    folder = tmp_path / "job"
    folder.mkdir()
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "RECYCLE_JOB_DIR": str(folder)}.items():
        monkeypatch.setenv(name, value)
    return folder


def test_a_mistyped_option_is_reported_to_the_job(generate: Generate, job: Path) -> None:
    """Prevents endless restarts of a job because the rank that exited first, or all ranks, did not report the error."""
    outcome = generate("--modle", "x")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", ""), "the first rank prints it"
    assert "--modle" in (job / "error").read_text() and (job / "outcome").read_text() == "failed\n"


def test_a_folder_that_takes_no_files_is_one_line(generate: Generate, prompts: Path) -> None:
    """Prevents a stack trace after the model was loaded: a superuser may write anywhere, but not in every file system."""
    outcome = generate("--prompts", str(prompts), "--output", "/proc/out.jsonl", "--max-new-tokens", "2")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and "name another --output" in outcome.err


def test_failed_prompts_are_reported_when_all_others_are_done(
    generate: Generate, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a job that ends at one prompt of thousands, one whose failed prompts nobody notices, and one that is
    restarted because of them."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = [PROMPT, PROMPT, "", "abcd " * 4000, PROMPT]
    prompts.write_text("".join(json.dumps({"prompt": text, "id": n}) + "\n" for n, text in enumerate(texts)))
    asked = ("--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "3")
    outcome = generate(*asked)
    lines = "".join(f"rank 1: {done} of 2 prompts, {FIGURES}\n" for done in (1, 2))
    note = "(note: measuring .*\n)?"  # on a slow machine
    assert outcome.code == 0 and re.fullmatch(note + lines, outcome.err), outcome.err
    assert not (job / "outcome").exists() and not output.exists(), "the first rank has not begun"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    failed = f"2 of 5 prompts failed and are listed in {output}.errors.jsonl"
    for _ in range(2):
        outcome = generate(*asked)
        assert (outcome.code, outcome.err.splitlines()[-1]) == (1, f"{output}: {failed}")
        assert (job / "error").read_text() == f"{failed}\n" and (job / "outcome").read_text() == "finished\n"
    assert len(outcome.err.splitlines()) == 1, "the second command decodes nothing"
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["id"], "text" in line, "error" in line) for line in found] == [
        (n, n not in (2, 3), n in (2, 3)) for n in range(5)
    ]
    empty, long = (json.loads(line) for line in Path(f"{output}.errors.jsonl").read_text().splitlines())
    assert (empty["line"], empty["id"], empty["error"]) == (3, 2, "the prompt is empty: give at least one character")
    assert (long["line"], long["id"]) == (4, 3) and "context holds 4096" in long["error"]


def test_an_option_that_no_prompt_can_have_ends_the_job(generate: Generate, job: Path, tmp_path: Path) -> None:
    """Prevents an output of nothing but errors for an option that the model does not support."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    outcome = generate("--prompts", str(prompts), "--output", str(output), "--bad-token", "99999")
    assert outcome.code == 2 and not output.exists()
    assert (job / "error").read_text().startswith("bad_tokens: the token id 99999 is none of the model's, ")
    assert (job / "outcome").read_text() == "failed\n"


def test_a_restart_continues_with_the_checkpoint_of_the_first_start(
    generate: Generate, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents an output of two models, because a running training saved a checkpoint before the second start."""
    run, prompts, output = tmp_path / "run", tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    shutil.copytree(model, run)
    (first,) = (run / "checkpoints").glob("step-*")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "ghij")))
    asked = ("--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert generate(*asked, folder=str(run)).code == 0
        shutil.copytree(first, first.with_name("step-00000009"), dirs_exist_ok=True)
        if rank == "0":
            (first.with_name("step-00000009") / "manifest.json").write_text("{}")  # must not be read
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == [PROMPT, "ghij"]
    assert all(set(record["generated_by"]) == {"key", "asked", "checkpoint", "digest"} for record in records)
    assert [path.name for path in output.parent.glob(".*")] == [], "no hidden file is left next to the output"
    monkeypatch.setenv("RANK", "0")
    outcome = generate(*asked, folder=str(run))
    assert outcome.code == 0 and "all prompts are done" in outcome.err
    outcome = generate(*asked, "--mode", "alternate", folder=str(run))
    assert outcome.code == 2 and "already exists" in outcome.err
