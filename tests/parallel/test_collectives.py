"""Collectives between tensor ranks: through shared memory where all ranks reach it, else through the process group."""

from __future__ import annotations

import threading
import time
from multiprocessing import shared_memory
from typing import Any

import torch
import torch.distributed as dist

from recycle_ds.inference.engine.collectives import GroupCollectives, SharedMemoryCollectives, collectives
from recycle_ds.parallel import common_memory as module
from recycle_ds.parallel.mesh import Axis
from tests.distributed import run_ranks


class _Unreachable:
    """Stands for a rank with a /dev/shm of its own, or too small a one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise FileNotFoundError("no such memory")


def _exchange(rank: int, world_size: int, blocked: int | None) -> tuple[str, list[Any]]:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    axis = Axis(group=dist.group.WORLD, size=world_size, rank=rank)
    original = shared_memory.SharedMemory
    if blocked == rank:
        module.shared_memory.SharedMemory = _Unreachable  # type: ignore[misc,assignment]
    try:
        own = collectives(axis, torch.device("cpu"))
    finally:
        module.shared_memory.SharedMemory = original  # type: ignore[misc]
    found: list[Any] = []
    for shape in ((1,), (3, 5), (1100, 1000)):  # the last one is larger than the shared memory's place
        for dtype in (torch.float32, torch.bfloat16):
            value = torch.full(shape, rank + 1, dtype=dtype)
            found.append(
                (own.sum(value.clone()).float().mean().item(), own.gather(value).float().flatten(1)[:, 0].tolist())
            )
    return type(own).__name__, found


def test_ranks_agree_on_shared_memory_or_do_without() -> None:
    """Prevents a crash where ranks of equal host names have separate shared memory, and ranks that wait for each other in
    different kinds of collectives."""
    for ranks, blocked, kind in (
        (2, None, SharedMemoryCollectives),
        (3, None, SharedMemoryCollectives),
        (2, 1, GroupCollectives),
        (2, 0, GroupCollectives),
    ):
        each = [rank + 1.0 for rank in range(ranks)]
        for name, found in run_ranks(_exchange, ranks, blocked):
            assert name == kind.__name__
            assert found == [(sum(each), each)] * 6


def _wait_long(rank: int, world_size: int) -> int:
    """How often another thread of rank 0 had its turn while the rank waited for rank 1."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    own = collectives(Axis(group=dist.group.WORLD, size=world_size, rank=rank), torch.device("cpu"))
    turns, ended = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not ended.wait(0.02):
            turns += 1

    thread = threading.Thread(target=count)
    if rank == 1:
        time.sleep(2)
    else:
        thread.start()
    try:
        own.sum(torch.ones(1))
        return turns
    finally:
        ended.set()


def test_a_rank_that_waits_lets_its_other_threads_run() -> None:
    """Prevents a rank that waits for a slow one from showing no sign of life: a thread that waits for Python's lock may never
    get it from one that gives it up and takes it again at once."""
    assert run_ranks(_wait_long, 2)[0] > 20  # of about 90
