"""slurm/retrofit.sbatch on a real cluster: the model's own text, then training, in one job that may be interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import load_config
from tests.runs import steps_of
from tests.slurm.jobs import Jobs

pytestmark = pytest.mark.slurm


def test_a_model_gets_a_module_on_its_own_text(jobs: Jobs, lab: Path, reference: list[list[float]]) -> None:
    """Prevents a job that trains on other text than what the model has written, that skips a step or starts it over after a
    signal, and a wrong argument that is found only after hours of writing."""
    model, text, run_dir = lab / "reference", lab / "it's own, text}", lab / "retrofit"
    settings = (
        "training.steps=4",
        "training.warmup_steps=1",
        "training.save_every=2",
        "recycle.gradient=frozen_backbone",
    )
    writing = (
        "--tokens",
        "1500",
        "--row-tokens",
        "40",
        "--held-out=4",
        "--min-tokens",
        "4",
        "--max-batch",
        "4",
        "--dtype=fp32",
    )
    job = jobs.submit(
        "retrofit.sbatch", "--model", str(model), *writing, "--output", str(text), "--config", str(lab / "run.yaml"),
        f"run_dir={run_dir}", *settings, options=("--time=10",), nodes=1,
    )  # fmt: skip
    jobs.until(lambda: any((text / "parts").glob("*")), job)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert jobs.field(job, "Restarts") == "1", jobs.log(job)
    manifest = json.loads((text / "self_text.json").read_text())
    assert manifest["train"]["tokens"] >= 1500 and manifest["validation"]["rows"] == 4
    assert [record["step"] for record in steps_of(run_dir)] == [1, 2, 3, 4]
    source = open_source(str(run_dir))
    assert source.step == 4 and source.recycle.gradient == "frozen_backbone"
    saved = load_config(run_dir / "config.yaml")
    assert [saved.data.train[0].path, saved.init_from] == [f"{text}/train", str(model)]
    assert not (lab / "jobs" / job).exists(), "a finished job must remove its folder"


def test_wrong_arguments_are_found_before_the_first_step(jobs: Jobs, lab: Path) -> None:
    """Prevents options that are ignored because no text is written, and a run without its model."""
    for arguments, words in (
        (("training.steps=4",), "give the model as --model DIR"),
        (("--model", str(lab / "corpus"), "--prompts", "p.jsonl"), "--prompts: without --tokens N no text is written"),
        (("--model", str(lab / "corpus"), "steps"), "steps: must be an option"),
    ):
        job = jobs.submit("retrofit.sbatch", *arguments, options=("--time=2",), nodes=1, tasks=1)
        assert jobs.wait(job) == "FAILED", jobs.log(job)
        assert (jobs.field(job, "ExitCode"), words in jobs.log(job)) == ("2:0", True), jobs.log(job)


def test_wrong_settings_of_the_training_are_found_before_the_writing(jobs: Jobs, lab: Path) -> None:
    """Prevents hours of writing for a training that ends at its first line: a misspelt setting, a folder that is no model."""
    text, corpus = lab / "unwritten", lab / "corpus"
    for setting, words in (
        ("training.stepz=10", "training.stepz=10: unknown key"),
        ("training.steps=10", f"{corpus}: no"),
    ):
        job = jobs.submit(
            "retrofit.sbatch", "--model", str(corpus), "--tokens", "1000", "--output", str(text), "--config",
            str(lab / "run.yaml"), setting, options=("--time=2",), nodes=1, tasks=1,
        )  # fmt: skip
        assert jobs.wait(job) == "FAILED", jobs.log(job)
        assert f"given up: {words}" in jobs.log(job), jobs.log(job)
        assert "self_text" not in jobs.log(job) and not text.exists(), jobs.log(job)
