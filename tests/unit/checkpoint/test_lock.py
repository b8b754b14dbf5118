"""The lock on a run folder: one run at a time, and locks whose holder has ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.run.lock import RunLock
from recycle_ds.parallel.job import Job
from tests.runs import ROOT

HOLD = """
import sys
from pathlib import Path
from recycle_ds.checkpoint.run.lock import RunLock
from recycle_ds.parallel.job import Job
lock = RunLock(Path(sys.argv[1]), Job(name=sys.argv[2] or None))
print("held", flush=True)
sys.stdin.read()
"""


def holder(folder: Path, job: str = "") -> subprocess.Popen[str]:
    """Starts another process that holds the folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), job],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_lock_excludes_others_until_its_process_ends(tmp_path: Path) -> None:
    """Prevents two runs in one folder, and a folder that stays locked after a kill."""
    process = holder(tmp_path, "8")
    try:
        with pytest.raises(CheckpointError, match=rf"in use by process {process.pid} on .* \(job 8\): wait for it"):
            RunLock(tmp_path)
        with pytest.raises(CheckpointError, match="in use"):
            RunLock(tmp_path, Job(name="9", restarts=1))
    finally:
        process.kill()
        process.communicate()
    RunLock(tmp_path).release()


def test_an_earlier_start_of_the_same_job_gives_way(tmp_path: Path) -> None:
    """Prevents a job requeued from a lost node, whose kernel keeps the lock, from waiting until a user deletes it."""
    process = holder(tmp_path, "8")
    try:
        lock = RunLock(tmp_path, Job(name="8", restarts=1))
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
            RunLock(tmp_path, Job(name="8", restarts=1))
        lock.release()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("locks", [True, False])
def test_an_earlier_start_that_is_alive_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    """Prevents two starts that both write, one on a node that SLURM cannot reach, and a stop without a takeover."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    earlier = RunLock(tmp_path, Job(name="8"))
    assert earlier.taken_by() is None
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    later = RunLock(tmp_path, Job(name="8", restarts=1))
    assert later.taken_by() is None
    assert earlier.taken_by() == f"process {os.getpid()} on elsewhere (job 8)"
    earlier.release()
    assert later.taken_by() is None and "released" not in json.loads((tmp_path / ".lock").read_text())
    later.release()
    assert earlier.taken_by() is not None, "also after the later start has finished"
    RunLock(tmp_path, Job(name="9")).release()  # a released folder is free, also without kernel locks


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, True),  # this process
        ({"pid": 999_999_999}, False),  # this process has ended
        ({"begun": "1"}, False),  # the pid now belongs to another process
        ({"host": "elsewhere", "pid": 999_999_999}, True),  # cannot be checked from this host
        ({"host": "elsewhere", "job": "4"}, False),  # an earlier start of the same job
        ({"host": "elsewhere", "job": "5"}, True),
    ],
)
def test_without_kernel_locks_the_file_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], refused: bool
) -> None:
    """Prevents refusing every run, or allowing two at once, on a file system without locks."""
    RunLock(tmp_path).release()
    lock = RunLock(tmp_path)
    record = json.loads((tmp_path / ".lock").read_text())
    assert record["host"] == socket.gethostname() and record["pid"] == os.getpid()
    lock.release()
    (tmp_path / ".lock").write_text(json.dumps(record | change))

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    job = Job(name="4", restarts=1)
    if refused:
        with pytest.raises(CheckpointError, match="delete it if that process has ended"):
            RunLock(tmp_path, job)
    else:
        RunLock(tmp_path, job).release()


def test_a_damaged_lock_file_is_no_lock(tmp_path: Path) -> None:
    """Prevents a run from failing to start because the machine crashed while the lock file was written."""
    (tmp_path / ".lock").write_text('{"host": "a", "pi')
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert json.loads((tmp_path / ".lock").read_text())["released"]
