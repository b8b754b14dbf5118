"""Memory that several ranks of one host share, for exchanges that are faster than through a process group.

A writer fills its place and then counts up; a reader waits for the count. x86 processors make stores visible in the
order in which they were made; elsewhere this must not be used.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
from multiprocessing import resource_tracker, shared_memory

import torch
import torch.distributed as dist

LINE = 64
"""Bytes between counters, so that ranks that write them do not take each other's cache line."""


def common_memory(group: dist.ProcessGroup | None, length: int) -> shared_memory.SharedMemory | None:
    """Memory of `length` bytes, zeroed, that all ranks of a group share; None on all of them if one cannot reach it: it is
    on another host, or in a container with a /dev/shm of its own, or too small, or its processor is no x86 one.

    Collective over the group.
    """
    first = dist.get_rank(group) == 0
    name = [f"recycle-ds-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(name, group_src=0, group=group)
    memory = None
    ordered = platform.machine() in ("x86_64", "AMD64")
    if first and ordered:
        with contextlib.suppress(OSError):
            memory = _reserve(name[0], length)
    dist.barrier(group=group)
    if not first and ordered:
        with contextlib.suppress(OSError):
            memory = shared_memory.SharedMemory(name[0])
    reached = torch.tensor(int(memory is not None))
    dist.all_reduce(reached, dist.ReduceOp.MIN, group=group)
    if memory is not None and first:
        memory.unlink()  # it stays until the last rank has ended, however that happens
    elif memory is not None:
        _forget(memory)
    if reached:
        return memory
    if memory is not None:
        memory.close()
    return None


def _reserve(name: str, length: int) -> shared_memory.SharedMemory:
    """Creates shared memory. Raises OSError if there is too little: without this check, the first use would end in a
    SIGBUS."""
    memory = shared_memory.SharedMemory(name, create=True, size=length)
    descriptor = memory._fd  # type: ignore[attr-defined]
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, length)
    except OSError:
        memory.close()
        memory.unlink()
        raise
    return memory


def _forget(memory: shared_memory.SharedMemory) -> None:
    """Tells multiprocessing's tracker that this rank need not remove memory that another rank has created."""
    resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
