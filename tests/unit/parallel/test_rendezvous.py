"""Who this process is, read from each launcher's variables."""

from __future__ import annotations

import pytest

from recycle_ds.parallel.rendezvous import Launch, LaunchError, detect_launch


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
    ],
)
def test_each_launcher_is_recognised(environment: dict[str, str], expected: Launch) -> None:
    """Ranks that each train alone because their launcher's variables were not seen."""
    assert detect_launch(environment) == expected


@pytest.mark.parametrize("environment", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_inconsistent_variables_are_refused(environment: dict[str, str]) -> None:
    """A broken environment that ends in a hang instead of a message."""
    with pytest.raises(LaunchError, match="RANK="):
        detect_launch(environment)


def test_tasks_that_would_each_train_alone() -> None:
    """Tasks of one srun, or ranks without a local rank, that take themselves for a single process or for one device."""
    with pytest.raises(LaunchError, match="srun started 4 tasks"):
        detect_launch({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"})
    with pytest.raises(LaunchError, match="LOCAL_RANK"):
        detect_launch({"RANK": "1", "WORLD_SIZE": "2"})
