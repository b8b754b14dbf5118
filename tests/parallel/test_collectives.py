"""Collectives between tensor ranks: through shared memory where all ranks reach it, else through the process group."""

from __future__ import annotations

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
