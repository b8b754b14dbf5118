"""The command with a file of prompts, as a job of several ranks calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.unit.inference.command import PROMPT, Generate


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a batch job whose second rank of two this process is."""
    folder = tmp_path / "job"
    folder.mkdir()
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "RECYCLE_JOB_DIR": str(folder)}.items():
        monkeypatch.setenv(name, value)
    return folder


def test_a_mistyped_option_is_told_to_the_job(generate: Generate, job: Path) -> None:
    """A job that is started again for ever, because the rank that left first had not said why, or none had."""
    outcome = generate("--modle", "x")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", ""), "the first rank prints it"
    assert "--modle" in (job / "error").read_text() and (job / "outcome").read_text() == "failed\n"


def test_a_rank_tells_what_is_wrong_with_its_own_prompt(generate: Generate, job: Path, tmp_path: Path) -> None:
    """A job that fails without a word, or without saying which of thousands of prompts is too long."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = [PROMPT, PROMPT, "abcd " * 4000, "abcd " * 4000]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    outcome = generate("--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "3")
    lines = outcome.err.splitlines()
    assert outcome.code == 2 and lines[0] == "rank 1: 1 of 2 prompts" and len(lines) == 2
    expected = f"{prompts}:4: the prompt has "
    assert lines[1].startswith(f"error: {expected}") and "context holds 4096" in lines[1]
    assert (job / "error").read_text().startswith(expected) and (job / "outcome").read_text() == "failed\n"


def test_prompts_go_on_with_the_checkpoint_that_they_were_begun_with(
    generate: Generate, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output of two models, because a live run had saved anew before the second start."""
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
            (first.with_name("step-00000009") / "manifest.json").write_text("{}")  # is not even looked at
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == [PROMPT, "ghij"]
    monkeypatch.setenv("RANK", "0")
    outcome = generate(*asked, folder=str(run))
    assert outcome.code == 0 and "all prompts are done" in outcome.err
    outcome = generate(*asked, "--mode", "alternate", folder=str(run))
    assert outcome.code == 2 and "already exists" in outcome.err
