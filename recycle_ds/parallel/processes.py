"""Processes of this host by an identity that no later process shares."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def identity_of(pid: int) -> str | None:
    """The host, the PID namespace, the PID and the start time of a process; None if it has ended, or where there is no
    /proc."""
    try:
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return f"{host} {namespace} {pid} {started}"


def kill(identity: str) -> bool:
    """Sends SIGKILL to another process of this host and user. Returns False if it is on another host, has ended, is this one,
    or must not be killed."""
    pid = int(identity.split()[2])
    if pid == os.getpid() or identity_of(pid) != identity:
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False
