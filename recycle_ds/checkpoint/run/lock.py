"""One run at a time in a run folder."""

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
    """Held from construction to `release`, or to the end of the process however it ends: the kernel keeps it.

    A kernel on a node that was lost may keep it for ever on a shared file system, and some file systems know no locks: the
    file also says who holds it. A lock of an earlier start of the same job, which SLURM has ended, and one of a process on
    this host that has ended are taken over at once. Should the earlier start still live, on a node that only SLURM cannot
    reach, `taken_by` tells it so, and it must write nothing any more. Raises CheckpointError while another run holds it.
    """

    def __init__(self, run_dir: Path, job: Job = Job()) -> None:  # noqa: B008 - frozen
        self._path = run_dir / NAME
        self._file = self._open()
        holder = _read(self._file)
        if holder.get("released"):
            holder = {}
        held = _lock(self._file)
        if held is False and _same_job(holder, job):
            # a new file under the same name: whoever still holds the old one holds nothing any more
            self._file.close()
            self._path.unlink(missing_ok=True)
            self._file = self._open()
            held = _lock(self._file)
        if held is None and holder and not (_same_job(holder, job) or _ended(holder)):
            self._refuse(run_dir, holder, " (this file system has no locks: delete it if that process has ended)")
        if held is False:
            self._refuse(run_dir, holder)
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begun": _begun(os.getpid()),
            "job": job.name,
            "restarts": job.restarts,
        }
        self._write(self._record)

    def taken_by(self) -> str | None:
        """Who has taken the folder over, None while it is ours. The file is opened anew: that is when NFS asks its server."""
        try:
            with self._path.open(encoding="utf-8") as file:
                holder = _read(file)
        except OSError:  # gone with the folder, or out of reach for now: no word of another run
            return None
        holder.pop("released", None)  # it was taken over all the same
        return None if not holder or holder == self._record else _describe(holder)

    def release(self) -> None:
        """Lets the next run in."""
        if self.taken_by() is None:
            with contextlib.suppress(OSError):  # a full disk: the kernel's lock ends with the file all the same
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
            f"{run_dir} is in use by {who}: wait for it, or use another run_dir; its lock is {self._path}{advice}"
        )


def _lock(file: IO[str]) -> bool | None:
    """True: ours. False: somebody else's. None: this file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(file: IO[str]) -> dict[str, Any]:
    """Who the file says holds it; empty for nobody, or for what cannot be read."""
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
    """Whether the holder is an earlier start of this very job."""
    return job.name is not None and holder.get("job") == job.name and int(holder.get("restarts") or 0) < job.restarts


def _ended(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to have ended: it was on this host, and its number is nobody's, or another process's, now."""
    return holder["host"] == socket.gethostname() and _begun(holder["pid"]) != holder["begun"]


def _begun(pid: Any) -> str | None:
    """When a process of this host began, in the kernel's clock ticks; None where there is no such process, or no /proc."""
    try:
        # the name, which may hold anything, ends with the last parenthesis; the 20th field after it is the start
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError):
        return None
