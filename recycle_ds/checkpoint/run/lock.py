"""The lock on a run folder: one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.parallel.job import Job

NAME = ".lock"


class RunLock:
    """A kernel lock (flock) held from construction to `release`, or to the end of the process, however it ends.

    On a shared file system the lock of a lost node may stay forever, and some file systems do not support locks, so the file
    also records the holder. The lock is taken over at once if the holder is an earlier start of the same job (which SLURM has
    ended) or a process on this host that has ended. If the earlier start is still alive, on a node that SLURM cannot reach, its
    `taken_by` reports the takeover, and it must not write anything from then on. Raises CheckpointError while another run
    holds the lock.
    """

    def __init__(self, run_dir: Path, job: Job = Job()) -> None:  # noqa: B008 - frozen
        self._path = run_dir / NAME
        self._file = self._open()
        holder = _read(self._file)
        if holder.get("released"):
            holder = {}
        locked = _try_lock(self._file)
        if locked is False and _same_job(holder, job):
            # a new file under the same name makes a lock on the old file ineffective
            self._file.close()
            self._path.unlink(missing_ok=True)
            self._file = self._open()
            locked = _try_lock(self._file)
        if locked is None and holder and not (_same_job(holder, job) or _ended(holder)):
            self._refuse(
                run_dir, holder, " (this file system does not support locks: delete it if that process has ended)"
            )
        if locked is False:
            self._refuse(run_dir, holder)
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begun": _start_time(os.getpid()),
            "job": job.name,
            "restarts": job.restarts,
        }
        self._write(self._record)

    def taken_by(self) -> str | None:
        """The process that has taken over the folder, None while this one owns it. The file is opened again each time, because
        NFS contacts its server only then."""
        try:
            with self._path.open(encoding="utf-8") as file:
                holder = _read(file)
        except OSError:  # deleted, or unreachable for now: no sign of another run
            return None
        holder.pop("released", None)  # a takeover by a run that has finished still counts
        return None if not holder or holder == self._record else _describe(holder)

    def release(self) -> None:
        """Releases the lock, so that the next run can start."""
        if self.taken_by() is None:
            with contextlib.suppress(OSError):  # disk full: closing the file releases the kernel lock anyway
                self._write(self._record | {"released": True})
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.seek(0)
        self._file.truncate(0)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _open(self) -> IO[str]:
        return self._path.open("a+", encoding="utf-8")

    def _refuse(self, run_dir: Path, holder: dict[str, Any], advice: str = "") -> None:
        self._file.close()
        who = _describe(holder) if holder else "another process"
        raise CheckpointError(
            f"{run_dir} is in use by {who}: wait for it, or use another run_dir; its lock file is {self._path}{advice}"
        )


def _try_lock(file: IO[str]) -> bool | None:
    """True: acquired. False: held by another process. None: the file system does not support locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(file: IO[str]) -> dict[str, Any]:
    """The holder recorded in the file; empty if there is none or the record is unreadable."""
    file.seek(0)
    try:
        record = json.loads(file.read())
    except ValueError:
        return {}
    return record if isinstance(record, dict) and {"host", "pid", "begun"} <= record.keys() else {}


def _describe(holder: dict[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}"
    return f"{who} (job {holder['job']})" if holder.get("job") else who


def _same_job(holder: dict[str, Any], job: Job) -> bool:
    """Whether the holder is an earlier start of the same job."""
    return job.name is not None and holder.get("job") == job.name and int(holder.get("restarts") or 0) < job.restarts


def _ended(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to have ended: it ran on this host, and its pid is now unused or another process's."""
    return holder["host"] == socket.gethostname() and _start_time(holder["pid"]) != holder["begun"]


def _start_time(pid: Any) -> str | None:
    """Start time of a process on this host, in kernel clock ticks; None if there is no such process or no /proc."""
    try:
        # the process name may contain anything and ends at the last parenthesis; the 20th field after it is the start time
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError):
        return None
