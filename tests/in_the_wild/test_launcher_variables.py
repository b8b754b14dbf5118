"""Variables that another launcher, shell or job has left over, and launchers inside one another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recycle_ds.parallel.rendezvous import LaunchError, detect_launch
from tests.runs import ROOT, make_corpus, tiny_run

# What srun sets for task 3 of 8, on the second of two nodes.
TASK = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "2"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            TASK | {"RANK": "0", "WORLD_SIZE": "1"},
            ["RANK=0 of WORLD_SIZE=1", "SLURM_PROCID=3 of SLURM_STEP_NUM_TASKS=8"],
        ),
        (TASK | {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, ["RANK=0", "SLURM_PROCID=3", "unset RANK"]),
        (TASK | {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}, ["WORLD_SIZE=16", "SLURM_STEP_NUM_TASKS=8"]),
        (TASK | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, ["GROUP_WORLD_SIZE=1 of torchrun", "--nnodes=8"]),
        (TASK | DEEPSPEED | {"CROSS_SIZE": "1"}, ["CROSS_SIZE=1 of deepspeed", "SLURM_STEP_NUM_TASKS=8"]),
        (MPI | {"RANK": "0", "WORLD_SIZE": "1"}, ["RANK=0 of WORLD_SIZE=1", "OMPI_COMM_WORLD_RANK=3"]),
        (
            MPI | {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0"},
            ["OMPI_COMM_WORLD_SIZE=8", "PMI_RANK=0 of PMI_SIZE=1"],
        ),
        (
            TASK | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            ["OMPI_COMM_WORLD_SIZE=1", "SLURM_STEP_NUM_TASKS=8"],
        ),
        (TASK | {"WORLD_SIZE": "4"}, ["WORLD_SIZE=4, but SLURM_STEP_NUM_TASKS=8: set both, or unset WORLD_SIZE"]),
        (TASK | {"RANK": "0"}, ["RANK=0, but SLURM_PROCID=3"]),
        ({"RANK": "3"}, ["RANK=3, but WORLD_SIZE is not set"]),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "0"}, ["WORLD_SIZE=8, but RANK is not set"]),
        (
            TASK | {"SLURM_STEP_NUM_NODES": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            ["MASTER_ADDR=127.0.0.1 contradicts SLURM_STEP_NUM_NODES=4"],
        ),
    ],
)
def test_a_contradiction_names_both(environment: dict[str, str], words: list[str]) -> None:
    """Prevents eight tasks that are each a run of one rank, all on one run folder."""
    with pytest.raises(LaunchError) as caught:
        detect_launch(environment)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "launcher", "rank", "size"),
    [
        (TASK, "srun", 3, 8),
        (TASK | {"WORLD_SIZE": "8"}, "srun", 3, 8),
        (TASK | {"SLURM_STEP_NUM_NODES": "4", "MASTER_ADDR": "node1"}, "srun", 3, 8),
        (TASK | {"SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": "localhost"}, "srun", 3, 8),
        ({"RANK": "0"}, "single", 0, 1),
        (TASK | {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "deepspeed", 3, 8),
        (TASK | TORCHRUN | {"GROUP_WORLD_SIZE": "8"}, "torchrun", 5, 16),
        (TASK | DEEPSPEED | {"CROSS_SIZE": "8"}, "deepspeed", 5, 16),
        (TASK | MPI, "mpi", 3, 8),
        (MPI | {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "deepspeed", 3, 8),
        # proxies of mpirun on two nodes, whose processes export their own numbers under the usual names
        (
            TASK
            | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
            | MPI
            | {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
            "deepspeed", 3, 8,
        ),
        # one task: a shell on a node, in which torchrun was started
        (TASK | {"SLURM_STEP_NUM_TASKS": "1"} | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "torchrun", 5, 16),
    ],
)  # fmt: skip
def test_launchers_inside_one_another(environment: dict[str, str], launcher: str, rank: int, size: int) -> None:
    """Prevents the refusal of torchrun, DeepSpeed's launcher or mpirun under srun."""
    found = detect_launch(environment)
    assert (found.launcher, found.rank, found.world_size) == (launcher, rank, size)


def test_the_run_ends_before_it_writes_anything(tmp_path: Path) -> None:
    """Prevents a run folder that several unrelated processes have started to write to."""
    from recycle_ds.config import save_config

    save_config(tiny_run(make_corpus(tmp_path / "corpus"), tmp_path / "run"), tmp_path / "run.yaml")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "recycle_ds.pretrain", "--config", str(tmp_path / "run.yaml")],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
        env=os.environ | TASK | {"RANK": "0", "WORLD_SIZE": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "RANK=0 of WORLD_SIZE=1 contradicts SLURM_PROCID=3 of SLURM_STEP_NUM_TASKS=8" in error
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
