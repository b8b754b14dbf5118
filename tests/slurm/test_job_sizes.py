"""A batch file of one's own that sources slurm/common.sh: as many ranks as SLURM was asked for, in every way to ask."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs

pytestmark = pytest.mark.slurm

_BATCH = """#!/bin/bash
set -euo pipefail
source "$SLURM_SUBMIT_DIR/slurm/common.sh"
launch tests.slurm.show_rank
"""


@dataclass(frozen=True)
class Case:
    """A job: sbatch's options, and what its ranks must get."""

    options: str
    nodes: tuple[int, ...]
    """Ranks on each node."""
    cpus: int = 1
    """CPUs of a task of the step: of a rank, or with torchrun of a launcher, which has those of its ranks."""
    gpus: str = ""
    """GPUs that the ranks of a node see, one after the other; of all ranks, if they see the same."""
    launcher: str = "srun"


ALL = "0,1,2,3"
CASES = [
    Case("--nodes=2 --ntasks=16", (8, 8)),
    Case("--ntasks=3", (3,)),
    Case("--nodes=2 --ntasks-per-node=3", (3, 3)),
    Case("--nodes=2 --ntasks=5 --exclusive", (3, 2), cpus=2),
    Case("--nodes=2 --ntasks=12 --ntasks-per-node=8", (6, 6)),
    Case("--nodes=2 --ntasks=4 --exclusive", (2, 2), cpus=4),
    Case("--nodes=2 --ntasks=8 --cpus-per-task=2", (4, 4), cpus=2),
    Case("--nodes=2 --ntasks=8 --gpus-per-task=1", (4, 4), gpus="0 1 2 3"),
    Case("--nodes=2 --gpus-per-node=4 --ntasks-per-gpu=1", (4, 4), gpus="0 1 2 3"),
    Case("--nodes=2 --gpus-per-node=4 --ntasks=8 --cpus-per-gpu=2", (4, 4), cpus=2, gpus=ALL),
    Case("--nodes=2", (1, 1)),
    Case("--nodes=2 --ntasks=4 --gpus-per-task=2", (2, 2), cpus=2, gpus=ALL, launcher="torchrun"),
    Case("--nodes=2 --gpus-per-node=4 --ntasks-per-gpu=1 --cpus-per-gpu=2", (4, 4), 8, ALL, "torchrun"),
]


def submit(jobs: Jobs, batch: Path, options: str, launcher: str) -> str:
    """Submits a batch file and returns the job's number."""
    exports = f"--export=ALL,LAUNCHER={launcher},JOBS_DIR={jobs.root}/jobs"
    log = f"--output={jobs.root}/logs/%j.out"
    command = ("sbatch", "--parsable", f"--chdir={ROOT}", log, exports, *options.split(), str(batch))
    return jobs.cluster.run(*command, PWD=str(ROOT)).strip()


def test_jobs_have_the_ranks_that_were_requested(jobs: Jobs, tmp_path: Path) -> None:
    """Prevents 2 ranks in place of 16, and ranks without the CPUs or GPUs that the job has for them."""
    batch = tmp_path / "own.sbatch"
    batch.write_text(_BATCH)
    numbers = [submit(jobs, batch, case.options, case.launcher) for case in CASES]
    for case, job in zip(CASES, numbers, strict=True):
        assert jobs.wait(job) == "COMPLETED", f"{case}:\n{jobs.log(job)}"
        found = {line for line in jobs.log(job).splitlines() if line.startswith("rank ")}
        expected = set()
        for node, count in enumerate(case.nodes):
            for local in range(count):
                rank, gpus = sum(case.nodes[:node]) + local, case.gpus.split(" ")
                seen = gpus[local] if len(gpus) > 1 else case.gpus
                expected.add(
                    f"rank {rank} of {sum(case.nodes)}, {local} on node{node + 1}, CPUs {case.cpus}, GPUs {seen}"
                )
        assert found == expected, f"{case}:\n{jobs.log(job)}"


@pytest.mark.parametrize(
    ("options", "launcher", "message"),
    [
        (
            "--nodes=2 --gpus-per-node=4",
            "srun",
            "4 GPUs per node, and no number of tasks: submit with --ntasks-per-node=4",
        ),
        ("--nodes=2 --gpus-per-node=2 --ntasks-per-gpu=2", "srun", "SLURM_NTASKS_PER_GPU=2: ranks would share a GPU"),
        (
            "--nodes=2 --ntasks=5",
            "torchrun",
            "): LAUNCHER=torchrun needs as many on every node: submit with --ntasks-per-node",
        ),
        (
            "--nodes=1 --ntasks=1 : --nodes=1 --ntasks=2",
            "srun",
            "heterogeneous job (SLURM_HET_SIZE=2): submit one component",
        ),
    ],
)
def test_jobs_that_cannot_be_counted(jobs: Jobs, tmp_path: Path, options: str, launcher: str, message: str) -> None:
    """Prevents a job that trains with a part of what it occupies, and says nothing."""
    batch = tmp_path / "own.sbatch"
    batch.write_text(_BATCH)
    job = submit(jobs, batch, options, launcher)
    assert jobs.wait(job) == "FAILED", jobs.log(job)
    (error,) = (line for line in jobs.log(job).splitlines() if line.startswith("error: "))
    assert message in error


def test_a_stale_rank_under_srun(cluster: Cluster) -> None:
    """Prevents `srun -n 8` with RANK=0 WORLD_SIZE=1 in the environment from being eight runs on one run folder."""
    code = "import os; from recycle_ds.parallel.launcher_variables import contradiction; print(contradiction(os.environ, True))"
    out = cluster.run("srun", "-n", "3", "python3", "-c", code, PYTHONPATH=str(ROOT), RANK="0", WORLD_SIZE="1")
    lines = sorted(out.splitlines())
    assert len(lines) == 3
    for rank, line in enumerate(lines):
        assert line.startswith(f"RANK=0 of WORLD_SIZE=1 contradicts SLURM_PROCID={rank} of SLURM_STEP_NUM_TASKS=3")


def test_newer_releases_of_slurm() -> None:
    """Prevents ranks with one CPU, or a launcher with one GPU, where --tres-per-task (SLURM 23.11) says how many."""
    variables = {
        "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "4",
        "SLURM_TRES_PER_TASK": "cpu=3,gres/gpu=1", "SLURM_JOB_CPUS_PER_NODE": "16(x2)", "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    script = (
        "source slurm/tasks.sh; count_tasks; echo $RANKS $TASKS $CPUS; echo $(rank_options); echo $(launcher_options)"
    )
    done = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, cwd=ROOT, env=variables, check=True, timeout=20
    )
    assert done.stdout.splitlines() == [
        "8 4 3",
        "--ntasks=8 --ntasks-per-node=4",
        "--ntasks=2 --ntasks-per-node=1 --cpus-per-task=12 --gpus-per-node=4",
    ]
