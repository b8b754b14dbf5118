"""Rank, world size and GPU of a process, from each launcher's variables."""

from __future__ import annotations

import pytest

from recycle_ds.parallel.rendezvous import Launch, LaunchError, detect_launch, device_index

SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_STEP_NODELIST": "gpu[007-009]",
    "SLURM_JOB_ID": "12",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch("single", 0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Launch("deepspeed", 3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, Launch("torchrun", 0, 2, 0)),
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"}, Launch("deepspeed", 9, 16, 1, 8)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, Launch("mpi", 1, 2, 1)),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Launch("mpi", 3, 4, 1),
        ),
        (SRUN, Launch("srun", 5, 7, 1, 3)),
        # srun's MPI support also sets rank and size
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"}, Launch("srun", 5, 7, 1, 3)),
        # processes of mpirun, below the proxy that it starts with srun
        (
            SRUN | {"PMI_RANK": "0", "PMI_SIZE": "14", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
            Launch("mpi", 0, 14, 0, 2),
        ),
        # one launcher per node, started by srun
        (
            SRUN
            | {"RANK": "1", "WORLD_SIZE": "14", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "7"},
            Launch("torchrun", 1, 14, 1),
        ),
        # a shell on a node, and the shell of a batch job
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch("single", 0, 1, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Launch("single", 0, 1, 0)),
    ],
)
def test_each_launcher_is_recognised(environment: dict[str, str], expected: Launch) -> None:
    """Prevents ranks from training independently because their launcher's variables were not recognised."""
    assert detect_launch(environment) == expected


@pytest.mark.parametrize("environment", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_inconsistent_variables_are_refused(environment: dict[str, str]) -> None:
    """Prevents inconsistent variables from causing a hang instead of an error message."""
    with pytest.raises(LaunchError, match="RANK="):
        detect_launch(environment)


def test_tasks_that_would_each_train_alone() -> None:
    """Prevents tasks of one srun that each run as a single process, and ranks without a local rank on one device."""
    with pytest.raises(LaunchError, match="SLURM_LOCALID"):
        detect_launch({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"})
    with pytest.raises(LaunchError, match="LOCAL_RANK"):
        detect_launch({"RANK": "1", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("launcher", "on_host", "local_rank", "visible", "expected"),
    [
        ("single", 0, 0, 1, 0),
        ("single", 0, 0, 8, 0),
        ("torchrun", 8, 5, 8, 5),
        ("deepspeed", 2, 1, 4, 1),
        ("torchrun", 1, 0, 1, 0),
        # --gpus-per-task=1: a task sees its own GPU only
        ("srun", 8, 5, 1, 0),
        ("mpi", 4, 3, 1, 0),
        ("srun", 8, 5, 8, 5),
        # a launcher that does not set the number of local ranks
        ("mpi", 0, 3, 8, 3),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(
    launcher: str, on_host: int, local_rank: int, visible: int, expected: int
) -> None:
    """Prevents a rank on another rank's GPU, and a task that requests a device that SLURM does not show it."""
    assert device_index(Launch(launcher, local_rank, 64, local_rank, on_host), visible) == expected


def test_gpus_that_slurm_bound_to_a_task() -> None:
    """Prevents a task with --gpus-per-task=2 from using a wrong GPU, or from refusing to start."""
    bound = detect_launch(SRUN | {"SLURM_GPUS_PER_TASK": "2"})
    assert bound.local_rank == 1 and device_index(bound, 2) == 0


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "none"},
        {"SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "verbose,none"},
        {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1", "SLURM_GPU_BIND": "none"},
        {"SLURM_GPUS_PER_TASK": "1"},  # a cluster whose SLURM does not restrict what a task sees
    ],
)
def test_gpus_that_every_task_sees(variables: dict[str, str]) -> None:
    """Prevents all tasks of a node from using its first GPU because their GPUs were requested per task."""
    tasks = [detect_launch(SRUN | variables | {"SLURM_LOCALID": str(local)}) for local in range(3)]
    assert [device_index(task, 3) for task in tasks] == [0, 1, 2]
    if "SLURM_GPU_BIND" in variables:
        with pytest.raises(LaunchError, match="3 ranks on this host and 2 visible GPUs"):
            device_index(tasks[0], 2)


@pytest.mark.parametrize(
    ("launcher", "on_host", "local_rank", "visible", "words"),
    [
        ("srun", 8, 0, 4, "8 ranks on this host and 4 visible GPUs"),
        ("srun", 8, 7, 4, "8 ranks on this host and 4 visible GPUs"),
        ("deepspeed", 2, 0, 1, "2 ranks on this host and 1 visible GPU:"),
        ("torchrun", 4, 0, 1, "4 ranks on this host and 1 visible GPU:"),
        ("mpi", 0, 5, 4, "6 ranks on this host and 4 visible GPUs"),
    ],
)
def test_a_shared_gpu_is_an_error(launcher: str, on_host: int, local_rank: int, visible: int, words: str) -> None:
    """Prevents two ranks on one GPU from running out of memory, or taking twice the time, without an error message."""
    with pytest.raises(LaunchError, match=f"{words}.*request one GPU per task"):
        device_index(Launch(launcher, local_rank, 64, local_rank, on_host), visible)
