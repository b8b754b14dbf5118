"""The batch job that a run is part of: the files that the run and the job's shell exchange, and the end of the job.

The shell (slurm/common.sh) creates a folder for the job and passes its path in RECYCLE_JOB_DIR. The files in it:

    shell       host and process ID of the shell of the current start, written by that shell
    stop        created by the shell when the run must save and exit because the job ends
    run_dir     the run folder
    progress    the step of the newest checkpoint (`generate`: the rank and its number of prompts done)
    outcome     how the run ended; the shell decides by it whether to requeue the job
    error       an error that a restart would hit again; with the outcome FINISHED: what a complete run could not do

Rank 0 writes run_dir, progress and outcome; in `generate` every rank writes progress and outcome. Any rank may write `error`,
and then sets `outcome` to FAILED, or, in `generate`, to FINISHED if only some prompts have failed. Without RECYCLE_JOB_DIR no
file is read or written.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.config.command import INTERRUPTED, user_errors
from recycle_ds.config.errors import RecycleError
from recycle_ds.parallel.peers import MachineFault, is_transient

FINISHED, SAVED_FOR_RESTART, STOPPED_BY_USER, FAILED = "finished", "saved_for_restart", "stopped_by_user", "failed"
"""Contents of `outcome`:

    finished             the run is complete; with a file `error`, the job's exit code is 1
    saved_for_restart    the run saved its state because the job must end; the next start of the job resumes it
    stopped_by_user      the run saved its state because the user asked it to stop; it is not restarted
    failed               the run hit an error that a restart would hit again; it is not restarted
"""


REQUEUE_EXIT_CODE = 75
"""Exit code (EX_TEMPFAIL) of a process that saved its state for a restart but could not write `outcome`. The batch scripts exit
with the same code when their job is to be started again (`EXIT_REQUEUE` in slurm/common.sh)."""


class ShellNotInformed(Exception):
    """A run saved for a restart but could not write `outcome`: the process must exit with REQUEUE_EXIT_CODE instead."""


@dataclass(frozen=True)
class Job:
    """The job, as described by environment variables. `Job()` means that there is no job."""

    folder: Path | None = None
    end: float | None = None
    """Unix time at which SLURM ends the job."""
    name: str | None = None
    """SLURM's job ID, which a requeue does not change."""
    restarts: int = 0
    shell: str | None = None
    """Host and process ID of the shell of this start. A later start of the job has another shell, but the same folder."""

    @property
    def stop_file(self) -> Path | None:
        """The file that the shell creates when the job must end; None without a job."""
        return None if self.folder is None else self.folder / "stop"

    def write_note(self, file: str, text: str) -> bool:
        """Writes one line to `file` for the shell. Returns False if it cannot be written, True otherwise.

        Writes nothing without a job, after a later start has taken over the folder, or over an outcome FAILED. A write error
        is printed as a warning and does not end the run; the shell then relies on the exit code.
        """
        if self.folder is None or self._replaced():
            return True
        try:
            if file == "outcome" and text != FAILED and self._outcome() == FAILED:
                return True
            write_atomically(self.folder / file, f"{text}\n")
        except OSError as error:
            print(f"warning: {self.folder / file}: {error.strerror or error}", flush=True)
            return False
        return True

    def fail(self, text: str) -> None:
        """Reports an error to the shell that a restart would hit again.

        Any rank may call it: when one rank exits, the launcher kills the others, possibly before rank 0 knows of the error.
        """
        self.write_note("error", text)
        self.write_note("outcome", FAILED)

    def _replaced(self) -> bool:
        """Whether a later start of the job has taken over the folder."""
        if self.folder is None or self.shell is None:
            return False
        try:
            return (self.folder / "shell").read_text(encoding="utf-8").strip() not in (self.shell, "")
        except OSError:  # no record of another start
            return False

    def _outcome(self) -> str:
        try:
            return (self.folder or Path()).joinpath("outcome").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""

    def requeue_if_orphaned(self) -> bool:
        """Requeues the job if its shell, which would otherwise do so, has been killed. Returns whether it was requeued."""
        if self.folder is None or self.name is None or os.environ.get("REQUEUE") != "1" or self._replaced():
            return False
        try:
            host, pid = (self.folder / "shell").read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            return False
        if host != socket.gethostname() or _alive(pid):
            return False
        name = os.environ.get("RECYCLE_JOB") or self.name
        try:
            details = subprocess.run(
                ["scontrol", "show", "job", name], capture_output=True, text=True, check=False
            ).stdout
            # this means that the shell was killed; a job cancelled by the user has another exit code
            if "ExitCode=0:9" not in details:
                return False
            print(f"the shell of job {name} was killed: requeueing the job", flush=True)
            return subprocess.run(["scontrol", "requeue", name], check=False).returncode == 0
        except OSError as error:  # no scontrol in a container
            print(f"warning: the shell of job {name} was killed, and the job cannot be requeued: {error}", flush=True)
            return False


def _alive(pid: str) -> bool:
    """Whether a process with this ID runs on this host. Zombies count as dead."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, ValueError, IndexError):
        return False


def job_of(environment: Mapping[str, str]) -> Job:
    """The job that the environment variables describe. A pure function."""
    folder, end = environment.get("RECYCLE_JOB_DIR"), environment.get("SLURM_JOB_END_TIME", "")
    restarts = environment.get("SLURM_RESTART_COUNT", "")
    return Job(
        folder=Path(folder) if folder else None,
        end=float(end) if end.isdigit() else None,
        name=environment.get("SLURM_JOB_ID"),
        restarts=int(restarts) if restarts.isdigit() else 0,
        shell=environment.get("RECYCLE_SHELL"),
    )


# Variables in which launchers pass the rank. SLURM_PROCID is last: under mpirun it is the rank of mpirun's proxy process.
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def is_error_reporter(environment: Mapping[str, str]) -> bool:
    """Whether this process prints the errors that all ranks share: only rank 0 does."""
    return next((environment[name] for name in _RANK_VARIABLES if name in environment), "0") == "0"


# Variables with the local rank: of torchrun and deepspeed, Open MPI, MPICH and srun.
_LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def is_to_report_interruption(reason: str | None, environment: Mapping[str, str]) -> bool:
    """Whether this process has to exit with INTERRUPTED after it has stopped for `reason`. After Ctrl-C, what follows in the
    user's shell must not take the work for finished; a job's shell reads `outcome` instead. Ranks other than the first of a
    host exit with 0: the launcher may end one that still has something to write once another has failed."""
    return reason == "SIGINT" and job_of(environment).folder is None and is_error_reporter(environment)


def code_of_unfinished(reason: str | None, environment: Mapping[str, str]) -> int:
    """The exit code of a process whose work is not finished, for the reason for which it has stopped: as by
    `is_to_report_interruption`, and likewise after SIGTERM, for work of which nothing can be used before it is finished."""
    if reason == "SIGTERM" and job_of(environment).folder is None and is_error_reporter(environment):
        return 128 + signal.SIGTERM
    return INTERRUPTED if is_to_report_interruption(reason, environment) else 0


def is_first_of_host(environment: Mapping[str, str]) -> bool:
    """Whether this process is local rank 0, the first rank on its host."""
    return next((environment[name] for name in _LOCAL_RANK_VARIABLES if name in environment), "0") == "0"


def errors_of_host() -> AbstractContextManager[None]:
    """Handles user errors of this process, see `user_errors`: the first rank and the first of every host print them.

    For files that may be missing on one host only, before the ranks can talk to one another.
    """
    prints = is_error_reporter(os.environ) or is_first_of_host(os.environ)
    return user_errors(print_error=prints, on_error=job_of(os.environ).fail)


@contextmanager
def transient_errors_of_host() -> Iterator[None]:
    """Raises a MachineFault in place of a transient file-system error, see `is_transient`: the job is started again.

    Of ranks that have not met yet. Rank 0 prints the error where it ends; here the first rank of any other host does."""
    try:
        yield
    except (RecycleError, OSError) as error:
        if not is_transient(error):
            raise
        if is_first_of_host(os.environ) and not is_error_reporter(os.environ):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise MachineFault(str(error)) from error
