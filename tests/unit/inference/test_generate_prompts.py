"""The generate command with a file of prompts, as a job of several ranks runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.unit.inference.command import PROMPT, Generate


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


def test_a_rank_reports_an_error_of_its_own_prompt(generate: Generate, job: Path, tmp_path: Path) -> None:
    """Prevents a job from failing without a message, or without naming the one prompt of thousands that is too long."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = [PROMPT, PROMPT, "abcd " * 4000, "abcd " * 4000]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    outcome = generate("--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "3")
    lines = outcome.err.splitlines()
    assert outcome.code == 2 and lines[0] == "rank 1: 1 of 2 prompts" and len(lines) == 2
    expected = f"{prompts}:4: the prompt has "
    assert lines[1].startswith(f"error: {expected}") and "context holds 4096" in lines[1]
    assert (job / "error").read_text().startswith(expected) and (job / "outcome").read_text() == "failed\n"


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
