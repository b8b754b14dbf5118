"""The batch job that a run is part of: how its shell and the run talk to each other, and when it ends.

The shell (slurm/common.sh) makes a folder for the job and names it in RECYCLE_JOB_DIR. It writes `stop` there when the job must
end; the first rank writes `run_dir`, `progress` (the step of the newest checkpoint) and `outcome`, by which the shell decides
whether to requeue; any rank that meets an error which a new start would meet again writes it to `error`, and FAILED to
`outcome`. Without such a folder all of this does nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recycle_ds.config.atomic_files import write_atomically

FINISHED, STOPPED, LEFT, FAILED = "finished", "stopped", "left", "failed"
"""Outcomes: all is done; saved for the job's sake, to go on in its next start; saved and left for good, as a person asked; an
error that a new start would meet again."""


class Unheard(Exception):
    """A run has saved for its job's sake, and could not tell the job's shell so: the exit code must."""


@dataclass(frozen=True)
class Job:
    """A job as its variables describe it."""

    folder: Path | None = None
    end: float | None = None
    """Unix time at which SLURM ends the job."""
    name: str | None = None
    """SLURM's number of the job, the same after a requeue."""
    restarts: int = 0
    shell: str | None = None
    """Host and process of the shell of this start; a later start of the same job has another one in the same folder."""

    @property
    def stop_file(self) -> Path | None:
        """Appears when the job must end."""
        return None if self.folder is None else self.folder / "stop"

    def tell(self, file: str, text: str) -> bool:
        """Leaves a line for the shell; an outcome FAILED stays, and so does all that is a later start's. False where it cannot
        be written: a full disk must not end the run, it is reported, and the shell goes by exit codes."""
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
        """Tells the shell of an error that a new start would meet again. Every rank may: the first to leave takes the others
        with it, perhaps before they know."""
        self.tell("error", text)
        self.tell("outcome", FAILED)

    def _replaced(self) -> bool:
        """Whether the folder has the shell of another start by now."""
        if self.folder is None or self.shell is None:
            return False
        try:
            return (self.folder / "shell").read_text(encoding="utf-8").strip() not in (self.shell, "")
        except OSError:  # no word of another start
            return False

    def _outcome(self) -> str:
        try:
            return (self.folder or Path()).joinpath("outcome").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""

    def requeue_if_orphaned(self) -> bool:
        """Starts the job again where its shell, which would do so, has been killed. Whether that was so."""
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
            shown = subprocess.run(
                ["scontrol", "show", "job", name], capture_output=True, text=True, check=False
            ).stdout
            if (
                "ExitCode=0:9" not in shown
            ):  # a shell that was killed; of a job that a person cancelled SLURM says otherwise
                return False
            print(f"the shell of job {name} has been killed: requeueing", flush=True)
            return subprocess.run(["scontrol", "requeue", name], check=False).returncode == 0
        except OSError as error:  # no scontrol in a container
            print(f"warning: the shell of job {name} has gone, and it cannot be requeued: {error}", flush=True)
            return False


def _alive(pid: str) -> bool:
    """Whether a process of this host runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, ValueError, IndexError):
        return False


def job_of(environment: Mapping[str, str]) -> Job:
    """The job that the environment speaks of. A pure function."""
    folder, end = environment.get("RECYCLE_JOB_DIR"), environment.get("SLURM_JOB_END_TIME", "")
    restarts = environment.get("SLURM_RESTART_COUNT", "")
    return Job(
        folder=Path(folder) if folder else None,
        end=float(end) if end.isdigit() else None,
        name=environment.get("SLURM_JOB_ID"),
        restarts=int(restarts) if restarts.isdigit() else 0,
        shell=environment.get("RECYCLE_SHELL"),
    )


# By which launchers tell a process its rank; in mpirun's processes under SLURM the last one speaks of mpirun's own proxy.
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def speaks(environment: Mapping[str, str]) -> bool:
    """Whether this process, among those started together, is the one that tells errors: the first."""
    return next((environment[name] for name in _RANKS if name in environment), "0") == "0"
