"""The files through which ranks report to the shell of their job."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recycle_ds.config import ConfigError
from recycle_ds.parallel.agree import SharedError, on_all_ranks
from recycle_ds.parallel.job import FAILED, SAVED_FOR_RESTART, STOPPED_BY_USER, Job, ShellNotInformed, job_of
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.peers import MachineFault
from recycle_ds.training.faults.job_end import conclude
from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, STOP_FILE


def test_a_failed_outcome_is_not_overwritten(tmp_path: Path) -> None:
    """Prevents a failed job from restarting because a rank that the failure stopped overwrote the outcome."""
    job = Job(folder=tmp_path)
    job.fail("the error")
    assert job.write_note("outcome", SAVED_FOR_RESTART)
    assert (tmp_path / "outcome").read_text() == f"{FAILED}\n" and (tmp_path / "error").read_text() == "the error\n"


def test_a_replaced_start_writes_nothing(tmp_path: Path) -> None:
    """Prevents an error of a start that SLURM no longer tracks from ending a later start of the job."""
    (tmp_path / "shell").write_text("node2 41\n")
    earlier, later = (
        job_of({"RECYCLE_JOB_DIR": str(tmp_path), "RECYCLE_SHELL": name}) for name in ("node1 7", "node2 41")
    )
    earlier.fail("cannot be written")
    assert not (tmp_path / "outcome").exists() and not (tmp_path / "error").exists()
    assert later.write_note("outcome", SAVED_FOR_RESTART)
    assert (tmp_path / "outcome").read_text() == f"{SAVED_FOR_RESTART}\n"


def test_ranks_that_fail_at_the_same_time(tmp_path: Path) -> None:
    """Prevents ranks that rename each other's unfinished files, or that crash while they report an error."""
    job = Job(folder=tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(job.fail, ["the same error"] * 64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error", "outcome"]
    assert (tmp_path / "error").read_text() == "the same error\n"


def test_the_outcome_of_a_run_is_reported(tmp_path: Path) -> None:
    """Prevents a user's stop request from being reported as the job's, and an unnoticed failure to report a stop."""
    job = Job(folder=tmp_path)
    for ended, outcome in (
        (STOP_FILE, STOPPED_BY_USER),
        (JOB_SIGNAL, SAVED_FOR_RESTART),
        ("SIGTERM", SAVED_FOR_RESTART),
        ("finished", "finished"),
    ):
        conclude(job, ended)
        assert (tmp_path / "outcome").read_text() == f"{outcome}\n"
    (tmp_path / "file").touch()
    with pytest.raises(ShellNotInformed):
        conclude(Job(folder=tmp_path / "file"), "SIGTERM")
    conclude(Job(folder=tmp_path / "file"), "finished")  # the exit code reports it
    conclude(Job(), "SIGTERM")  # no job


def test_a_transient_file_system_error_is_not_the_users() -> None:
    """Prevents a job that ends because a file server was unreachable for a minute, or restarts after a wrong path."""

    def fail(error: Exception) -> None:
        raise error

    def wrap(error: OSError) -> None:
        try:
            raise error
        except OSError:
            raise ConfigError("reworded") from None

    for number in (errno.ESTALE, errno.EIO, errno.ENOSPC):
        with pytest.raises(MachineFault, match="data"):
            on_all_ranks(lambda n=number: fail(OSError(n, "unreachable", "data")), Mesh())  # type: ignore[misc]
        with pytest.raises(MachineFault, match="reworded"):
            on_all_ranks(lambda n=number: wrap(OSError(n, "unreachable")), Mesh())  # type: ignore[misc]
    with pytest.raises(SharedError, match="no such thing"):
        on_all_ranks(lambda: fail(FileNotFoundError(errno.ENOENT, "no such thing")), Mesh())
    with pytest.raises(SharedError, match="wrong"):
        on_all_ranks(lambda: fail(ConfigError("wrong")), Mesh())
