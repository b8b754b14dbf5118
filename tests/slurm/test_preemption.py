"""However the ranks of a job end, the job resumes without a user, with the losses of an uninterrupted run."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recycle_ds.checkpoint.portable.folders import completed
from tests.runs import figures, read_metrics
from tests.slurm.jobs import Jobs, ranks_of, reached

pytestmark = pytest.mark.slurm
ALL = os.environ.get("RECYCLE_TEST_ALL") == "1"
# The reason in the log for each stop at which the run saves.
REASONS = {"usr1": "job signal", "term": "SIGTERM"}


def usr1(jobs: Jobs, job: str, run_dir: Path) -> None:
    """The signal that --signal=B:USR1@N sends before the time limit."""
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)


def term(jobs: Jobs, job: str, run_dir: Path) -> None:
    """The signal of a preemption with a grace time: sent to the steps, not to the shell."""
    jobs.cluster.run("scancel", "--signal=TERM", job)


def requeue(jobs: Jobs, job: str, run_dir: Path) -> None:
    """An administrator's requeue."""
    jobs.cluster.run("scontrol", "requeue", job)


def node_down(jobs: Jobs, job: str, run_dir: Path) -> None:
    """A node is taken out of service, and returned to service."""
    jobs.cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    jobs.until(lambda: jobs.field(job, "JobState") != "RUNNING", job)
    jobs.cluster.run("scontrol", "update", "nodename=node2", "state=resume", check=False)


def killed_rank(jobs: Jobs, job: str, run_dir: Path) -> None:
    """The kernel's out-of-memory killer."""
    os.kill(ranks_of(run_dir)[2], signal.SIGKILL)


def killed_slurmd(jobs: Jobs, job: str, run_dir: Path) -> None:
    """A node's daemon dies; the controller notices, and the daemon is started again."""
    jobs.cluster.kill_slurmd("node2")
    jobs.until(lambda: jobs.field(job, "JobState") != "RUNNING", job)
    jobs.cluster.start_slurmd("node2")


def killed_shell(jobs: Jobs, job: str, run_dir: Path) -> None:
    """The batch shell dies. SLURM treats this as the end of the job and ends the ranks."""
    pid = (jobs.root / "jobs" / job / "shell").read_text().split()[1]
    os.kill(int(pid), signal.SIGKILL)


WAYS: dict[str, Callable[[Jobs, str, Path], None]] = {
    way.__name__: way for way in (usr1, term, requeue, node_down, killed_rank, killed_slurmd, killed_shell)
}
# One stop at which the run saves, one requeue by SLURM itself, and one failure that SLURM does not notice.
SAMPLE = [random.Random(7).choice(pair) for pair in (("usr1", "term"), ("requeue", "node_down"), ("killed_rank",))]


@pytest.mark.parametrize("way", [name for name in WAYS if ALL or name in SAMPLE])
def test_the_job_resumes_without_help(jobs: Jobs, lab: Path, reference: list[list[float]], way: str) -> None:
    """Prevents a job that needs a user after a preemption, loses saved steps, or resumes with other results."""
    run_dir = lab / way
    # the controller takes a while to notice a dead daemon: the run must not finish before that
    slow = "slow:3" if way == "killed_slurmd" else ""
    common = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}")
    job = jobs.submit("pretrain.sbatch", *common, options=("--time=10",), inject=slow)
    jobs.until_step(run_dir, 12, job)
    WAYS[way](jobs, job, run_dir)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    log = jobs.log(job)
    assert int(jobs.field(job, "Restarts")) >= 1, log
    assert figures(run_dir) == reference, "bit for bit"
    resumed = [record["step"] for record in read_metrics(run_dir) if record.get("event") == "resume"]
    assert resumed and resumed[0] >= 10, log
    if way in REASONS:
        stopped = re.search(rf"^{REASONS[way]} at step (\d+)$", log, re.MULTILINE)
        assert stopped is not None and int(stopped.group(1)) == resumed[0], (
            "it must resume from the step at which it was stopped"
        )
    assert "restarts 1" in log.rpartition("summary of")[2], log


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("way", ["term", "killed_rank"])
def test_under_other_launchers(jobs: Jobs, lab: Path, reference: list[list[float]], way: str, launcher: str) -> None:
    """Prevents a launcher from ending its ranks before they have saved, or from running on after a rank has died."""
    run_dir = lab / f"{way}_{launcher}"
    common = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}")
    job = jobs.submit("pretrain.sbatch", *common, options=("--time=10",), LAUNCHER=launcher)
    jobs.until_step(run_dir, 12, job)
    WAYS[way](jobs, job, run_dir)
    assert jobs.wait(job, timeout=240) == "COMPLETED", jobs.log(job)
    assert figures(run_dir) == reference, "bit for bit"
    assert int(jobs.field(job, "Restarts")) == 1, jobs.log(job)


@pytest.mark.full
def test_the_signal_before_the_time_limit(jobs: Jobs, lab: Path, reference: list[list[float]]) -> None:
    """Prevents SLURM's own signal from being missed: the job would end at its limit without a requeue."""
    run_dir = lab / "limit"
    common = ("--config", str(lab / "run.yaml"), f"run_dir={run_dir}")
    job = jobs.submit("pretrain.sbatch", *common, options=("--time=1",), signal="B:USR1@30", inject="slow:2.5")
    assert jobs.wait(job, timeout=240) == "COMPLETED", jobs.log(job)
    assert figures(run_dir) == reference, "bit for bit"
    assert int(jobs.field(job, "Restarts")) >= 1 and "got USR1" in jobs.log(job)


@pytest.mark.full
def test_a_task_of_an_array_is_requeued_alone(jobs: Jobs, lab: Path) -> None:
    """Prevents a preempted task from requeueing all tasks of its array: one task has the job number of the array."""
    sweep = lab / "preempted.txt"
    sweep.write_text("one\ntwo training.learning_rate=2e-3\n")
    common = ("--config", str(lab / "run.yaml"), "training.steps=30")
    folder = lab / "sweeps" / "preempted"
    array = jobs.submit(
        "sweep.sbatch", str(sweep), *common, options=("--time=10", "--array=1-2"), tasks=1, nodes=1,
        inject="slow:0.5", RUNS_DIR=str(lab / "sweeps"),
    )  # fmt: skip
    tasks = [f"{array}_1", f"{array}_2"]
    for name in ("one", "two"):
        jobs.until_step(folder / name, 4, array)
    # the last task has the job number of the array
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", tasks[1])
    for task in tasks:
        assert jobs.wait(task) == "COMPLETED", jobs.log(jobs.field(task, "JobId"))
    assert [int(jobs.field(task, "Restarts")) for task in tasks] == [0, 1]


def test_jobs_that_are_not_requeued(jobs: Jobs, lab: Path) -> None:
    """Prevents a requeue of a job that was cancelled or stopped or has REQUEUE=0, and two jobs in one folder."""
    common = ("--config", str(lab / "run.yaml"))
    cancelled, kept, stopped = lab / "cancelled", lab / "kept", lab / "stopped"

    def submit(run_dir: Path, **rest: str) -> str:
        # one rank on each node: three jobs share the machine, and each imports torch in every rank
        return jobs.submit("pretrain.sbatch", *common, f"run_dir={run_dir}", options=("--time=10",), tasks=1, **rest)

    # both run while a second job for the same folder starts
    first, third = submit(cancelled, inject="slow:3"), submit(stopped, inject="slow:3")
    jobs.until_step(cancelled, 1, first)
    duplicate = submit(cancelled)
    jobs.until_step(stopped, 1, third)
    (stopped / "stop").touch()
    assert jobs.wait(duplicate) == "FAILED" and int(jobs.field(duplicate, "Restarts")) == 0
    assert f"{cancelled} is in use by process" in jobs.log(duplicate) and f"(job {first})" in jobs.log(duplicate)
    jobs.cluster.run("scancel", first)
    assert jobs.wait(first) == "CANCELLED"
    assert jobs.wait(third) == "COMPLETED" and int(jobs.field(third, "Restarts")) == 0
    assert completed(stopped)[0].name == f"step-{reached(stopped):08d}" and "stopped by the user" in jobs.log(third)
    second = submit(kept, REQUEUE="0", LAUNCHER="torchrun")
    jobs.until_step(kept, 6, second)
    jobs.cluster.run("scancel", "--batch", "--signal=TERM", second)
    jobs.wait(second)
    assert jobs.field(second, "ExitCode") == "75:0", jobs.log(second)
    time.sleep(5)
    assert int(jobs.field(first, "Restarts")) == 0 and jobs.field(first, "JobState") == "CANCELLED"


def test_errors_that_a_restart_would_not_fix(jobs: Jobs, lab: Path) -> None:
    """Prevents endless restarts of a job that cannot start, if the first rank ended before it reported the error."""
    common = ("--config", str(lab / "run.yaml"), f"run_dir={lab / 'never'}")
    wrong = jobs.submit("pretrain.sbatch", *common, "training.stps=3", options=("--time=10",))
    assert jobs.wait(wrong) == "FAILED" and int(jobs.field(wrong, "Restarts")) == 0, jobs.log(wrong)
    assert (
        jobs.log(wrong)
        .splitlines()[-1]
        .endswith("given up: training.stps=3: unknown key, did you mean training.steps?")
    )
    dies = jobs.submit("pretrain.sbatch", *common, options=("--time=10",), inject="die:3", MAX_CRASHES="2")
    assert jobs.wait(dies) == "FAILED" and int(jobs.field(dies, "Restarts")) == 1, jobs.log(dies)
    assert "given up: 2 crashes in a row" in jobs.log(dies).splitlines()[-1]
    asks = ("--modle", "x", "--prompts", "a", "--output", "b")
    generate = jobs.submit("generate.sbatch", *asks, options=("--time=10",), nodes=1)
    assert jobs.wait(generate) == "FAILED" and int(jobs.field(generate, "Restarts")) == 0, jobs.log(generate)
