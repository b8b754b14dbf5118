"""The shipped sbatch files on a real cluster: launchers, faults during a run, sweeps, conversion and generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.recognition import open_source
from tests.runs import ROOT, figures, read_metrics, steps_of
from tests.slurm.jobs import Jobs, ranks_of, reached

pytestmark = pytest.mark.slurm
TIME = ("--time=10",)


def devices_of(pid: int) -> str:
    """CUDA_VISIBLE_DEVICES of a process."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(line.decode().partition("=")[2] for line in variables if line.startswith(b"CUDA_VISIBLE_DEVICES="))


def events_of(run_dir: Path, *names: str) -> list[dict[str, object]]:
    return [record for record in read_metrics(run_dir) if record.get("event") in names]


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_every_launcher_trains_alike(jobs: Jobs, lab: Path, reference: list[list[float]], launcher: str) -> None:
    """Prevents ranks that do not connect across nodes, get the wrong number, or lose the GPUs that SLURM assigned."""
    run_dir = lab / launcher
    config = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}")
    # another job occupies the first two of a node's four GPUs
    other = jobs.cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--output=/dev/null",
        "--wrap=sleep 300",
    ).strip()  # fmt: skip
    jobs.until(lambda: jobs.field(other, "JobState") == "RUNNING", other)
    job = jobs.submit("pretrain.sbatch", *config, options=TIME, inject="slow:0.1", LAUNCHER=launcher)
    jobs.until_step(run_dir, 1, job)
    assert [devices_of(pid) for pid in ranks_of(run_dir)] == ["2,3"] * 4
    jobs.cluster.run("scancel", other)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert figures(run_dir) == reference, "bit for bit"
    assert json.loads((run_dir / "run.json").read_text())["world_size"] == 4
    assert f"summary of {run_dir}: finished at step 40 of 40" in jobs.log(job)
    assert not (lab / "jobs" / job).exists(), "a finished job must remove its folder"


def test_a_nan_on_one_rank_is_retried(jobs: Jobs, lab: Path, reference: list[list[float]]) -> None:
    """Prevents a transient fault on one rank from changing the weights, ending the run, or losing a batch."""
    run_dir = lab / "nan"
    config = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}", "training.nonfinite=retry")
    job = jobs.submit("pretrain.sbatch", *config, options=TIME, inject="nan:14:2")
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert figures(run_dir) == reference, "bit for bit"
    assert [(e["step"], e["action"]) for e in events_of(run_dir, "nonfinite")] == [(14, "retry")]
    assert "anomalies: nonfinite 1" in jobs.log(job)


def test_a_spike_is_rolled_back(jobs: Jobs, lab: Path, reference: list[list[float]]) -> None:
    """Prevents a loss spike that stays in the weights, and a rollback that reads the same data or needs a user."""
    run_dir = lab / "spike"
    config = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}", "faults.spike=rollback")
    job = jobs.submit("pretrain.sbatch", *config, options=TIME, inject="spike:28")
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    (rollback,) = events_of(run_dir, "rollback")
    assert (rollback["step"], rollback["from_step"], rollback["samples"]) == (25, 28, 3 * 8)
    assert [record["step"] for record in steps_of(run_dir)] == list(range(1, 41))
    assert figures(run_dir)[:25] == reference[:25] and figures(run_dir)[25:] != reference[25:]
    # the data differ from those of the reference run, so the tolerance is the range of its last losses
    last = [row[1] for row in reference[-8:]]
    assert abs(figures(run_dir)[-1][1] - reference[-1][1]) < max(last) - min(last) + 0.05


def test_a_hang_ends_and_restarts(jobs: Jobs, lab: Path, reference: list[list[float]]) -> None:
    """Prevents a job from occupying its nodes until the time limit because an unidentified rank hangs."""
    run_dir = lab / "hang"
    config = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}", "faults.hang_timeout=8")
    job = jobs.submit("pretrain.sbatch", *config, options=TIME, inject="hang:13:3")
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert figures(run_dir) == reference, "bit for bit"
    assert int(jobs.field(job, "Restarts")) == 1
    folder = run_dir / "hangs" / "step-00000013"
    assert sorted(path.name for path in folder.iterdir()) == [f"rank-{rank:05d}.txt" for rank in range(4)]
    assert "_before_data" in (folder / "rank-00003.txt").read_text(), "the stack trace shows where"
    assert "hang: ranks behind the others: rank 3 on node2" in jobs.log(job)


def test_a_full_disk_does_not_end_the_run(jobs: Jobs, lab: Path, reference: list[list[float]]) -> None:
    """Prevents a failed save on one node from ending the run, and an incomplete checkpoint from counting as intact."""
    run_dir = lab / "full"
    config = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}")
    job = jobs.submit("pretrain.sbatch", *config, options=TIME, inject="enospc:20:3")
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert figures(run_dir) == reference, "bit for bit"
    assert [event["step"] for event in events_of(run_dir, "save_failed")] == [20]
    assert "rank 3: saving failed: No space left on device" in jobs.log(job)
    assert [path.name for path in completed(run_dir)] == [f"step-000000{step}" for step in (40, 35, 30, 25)]
    for folder in completed(run_dir):
        open_source(folder)


def test_a_slow_rank_is_named(jobs: Jobs, lab: Path) -> None:
    """Prevents a slow rank, which delays all others, from being missing in the log."""
    run_dir = lab / "straggler"
    config = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}", "training.stop_at=6", "training.log_every=3")
    job = jobs.submit("pretrain.sbatch", *config, options=TIME, inject="slow:0.5:1")
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert {event["rank"] for event in events_of(run_dir, "straggler")} == {1}
    assert "rank 1 on node1 needs" in jobs.log(job)


def test_the_end_of_the_job_needs_no_signal(jobs: Jobs, lab: Path) -> None:
    """Prevents a job without a signal from being killed at its time limit: the run knows its end time."""
    run_dir = lab / "time_limit"
    config = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}", "training.steps=100000", "faults.stop_margin=35")
    job = jobs.submit("pretrain.sbatch", *config, options=("--time=1",), REQUEUE="0", signal="none")
    jobs.wait(job)
    assert jobs.field(job, "ExitCode") == "75:0", jobs.log(job)
    assert "time limit at step" in jobs.log(job)
    assert completed(run_dir)[0].name == f"step-{reached(run_dir):08d}"


def test_a_sweep_names_the_bad_run(jobs: Jobs, lab: Path) -> None:
    """Prevents a bad run of an array from stopping the others, or from going unreported."""
    sweep = lab / "sweep.txt"
    sweep.write_text(
        "# name, changes\nplain\nfast training.learning_rate=4e-3\n"
        "bad training.global_batch_size=7\n\nseed training.seed=5\n"
    )
    common = ("--config", str(lab / "run.yaml"), "training.steps=6")
    sizes = {"tasks": 1, "nodes": 1, "RUNS_DIR": str(lab / "sweeps")}
    job = jobs.submit("sweep.sbatch", str(sweep), *common, options=("--time=10", "--array=1-4"), **sizes)
    jobs.until(lambda: "not finished" in all_logs(jobs), job, timeout=240)
    summaries = [text for text in all_logs(jobs).splitlines() if text.startswith("not finished")]
    expected = f"not finished: {lab}/sweeps/sweep/bad: training.global_batch_size (7) must be a multiple of "
    assert summaries and all(line.startswith(expected) for line in summaries), summaries
    for name in ("plain", "fast", "seed"):
        assert json.loads((lab / "sweeps" / "sweep" / name / "summary.json").read_text())["state"] == "finished"
    curves = [figures(lab / "sweeps" / "sweep" / name) for name in ("plain", "fast", "seed")]
    assert all(len(curve) == 6 for curve in curves) and len({str(curve) for curve in curves}) == 3


def all_logs(jobs: Jobs) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted((jobs.root / "logs").iterdir()))


def test_convert_then_generate(jobs: Jobs, lab: Path, reference: list[list[float]]) -> None:
    """Prevents prompts that are lost, repeated or out of order when tasks share them or the job restarts, and a job that
    is restarted, or not reported, because of a prompt that cannot be continued."""
    model, prompts, output = lab / "hf", lab / "prompts.jsonl", lab / "out.jsonl"
    job = jobs.submit(
        "convert.sbatch", str(lab / "reference"), str(model), "--to", "hf", options=TIME, nodes=1, tasks=1
    )
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    texts = [json.loads(line)["text"] for line in (lab / "corpus" / "texts.jsonl").read_text().splitlines()[:18]]
    prompts.write_text("".join(json.dumps({"prompt": text[:12], "id": f"p{n}"}) + "\n" for n, text in enumerate(texts)))
    settings = ("--model", str(model), "--prompts", str(prompts), "--max-new-tokens", "12")
    job = jobs.submit("generate.sbatch", *settings, "--output", str(output), options=TIME, inject="slow_prompt:1.0")
    parts = lab / "out.jsonl.parts"

    def started() -> bool:
        return sum(part.read_text().count("\n") for part in parts.glob("part-*")) >= 4

    jobs.until(started, job)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert int(jobs.field(job, "Restarts")) == 1, jobs.log(job)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["id"], line["prompt"]) for line in found] == [(f"p{n}", text[:12]) for n, text in enumerate(texts)]
    assert not parts.exists()
    single = lab / "single.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "recycle_ds.generate", *settings, "--output", str(single)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = [json.loads(line)["token_ids"] for line in single.read_text().splitlines()]
    assert [line["token_ids"] for line in found] == expected
    # the tasks of two nodes hold one model together, and one prompt is too long
    prompts.write_text(json.dumps({"prompt": "abcd " * 100, "id": "long"}) + "\n" + prompts.read_text())
    failed, layout = lab / "failed.jsonl", ("--tensor", "2", "--pipeline", "2", "--max-batch", "6")
    job = jobs.submit("generate.sbatch", *settings, *layout, "--output", str(failed), options=TIME, nodes=2, tasks=2)
    assert (jobs.wait(job), jobs.field(job, "ExitCode"), jobs.field(job, "Restarts")) == ("FAILED", "1:0", "0")
    report = f"finished with errors: 1 of 19 prompts failed and are listed in {failed}.errors.jsonl"
    assert jobs.log(job).splitlines()[-1].endswith(report), jobs.log(job)
    long, *others = (json.loads(line) for line in failed.read_text().splitlines())
    assert "context holds 64" in long["error"]
    assert [(line["id"], line["token_ids"]) for line in others] == [
        (line["id"], ids) for line, ids in zip(found, expected, strict=True)
    ]
    assert not (lab / "jobs" / job).exists(), "a finished job must remove its folder"
