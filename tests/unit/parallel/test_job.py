"""What ranks tell the shell of their job."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from recycle_ds.config import ConfigError
from recycle_ds.parallel.agree import SharedError, together
from recycle_ds.parallel.job import FAILED, LEFT, STOPPED, Job, Unheard, job_of
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.peers import MachineFault
from recycle_ds.training.faults.job_end import conclude
from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, STOP_FILE


def test_a_failure_is_not_talked_over(tmp_path: Path) -> None:
    """A rank that is ended because of another one's error, says that it was stopped, and so has the job started again."""
    job = Job(folder=tmp_path)
    job.fail("the error")
    assert job.tell("outcome", STOPPED)
    assert (tmp_path / "outcome").read_text() == f"{FAILED}\n" and (tmp_path / "error").read_text() == "the error\n"


def test_a_later_starts_folder_is_left_alone(tmp_path: Path) -> None:
    """A start that SLURM has lost from sight, and that has its successor given up by an error of its own."""
    (tmp_path / "shell").write_text("node2 41\n")
    earlier, later = (
        job_of({"RECYCLE_JOB_DIR": str(tmp_path), "RECYCLE_SHELL": name}) for name in ("node1 7", "node2 41")
    )
    earlier.fail("cannot be written")
    assert not (tmp_path / "outcome").exists() and not (tmp_path / "error").exists()
    assert later.tell("outcome", STOPPED) and (tmp_path / "outcome").read_text() == f"{STOPPED}\n"


def test_ranks_that_fail_at_once(tmp_path: Path) -> None:
    """Ranks that move one another's half-written file into place, and end with a traceback of their own."""
    job = Job(folder=tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(job.fail, ["the same error"] * 64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error", "outcome"]
    assert (tmp_path / "error").read_text() == "the same error\n"


def test_how_a_run_ended_is_told(tmp_path: Path) -> None:
    """A person's wish to stop that is taken for the job's, or a stop that nobody hears of because the disk is full."""
    job = Job(folder=tmp_path)
    for ended, outcome in ((STOP_FILE, LEFT), (JOB_SIGNAL, STOPPED), ("SIGTERM", STOPPED), ("finished", "finished")):
        conclude(job, ended)
        assert (tmp_path / "outcome").read_text() == f"{outcome}\n"
    (tmp_path / "file").touch()
    with pytest.raises(Unheard):
        conclude(Job(folder=tmp_path / "file"), "SIGTERM")
    conclude(Job(folder=tmp_path / "file"), "finished")  # the exit code says it
    conclude(Job(), "SIGTERM")  # no job


def test_a_fault_that_may_pass_is_no_users_error() -> None:
    """A job given up for good because a file server was away for a minute, or started again over a wrong path."""

    def fail(error: Exception) -> None:
        raise error

    def reword(error: OSError) -> None:
        try:
            raise error
        except OSError:
            raise ConfigError("in other words") from None

    place = torch.device("cpu")
    for number in (errno.ESTALE, errno.EIO, errno.ENOSPC):
        with pytest.raises(MachineFault, match="data"):
            together(lambda n=number: fail(OSError(n, "away", "data")), Mesh(), place)  # type: ignore[misc]
        with pytest.raises(MachineFault, match="in other words"):
            together(lambda n=number: reword(OSError(n, "away")), Mesh(), place)  # type: ignore[misc]
    with pytest.raises(SharedError, match="no such thing"):
        together(lambda: fail(FileNotFoundError(errno.ENOENT, "no such thing")), Mesh(), place)
    with pytest.raises(SharedError, match="wrong"):
        together(lambda: fail(ConfigError("wrong")), Mesh(), place)
