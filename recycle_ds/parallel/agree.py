"""Errors shared by all ranks: if one rank fails, every rank raises its error, so that no rank waits forever in a collective."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from recycle_ds.config import RecycleError
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.peers import MachineFault, is_transient

T = TypeVar("T")


class SharedError(RecycleError):
    """An error that every rank raises; it occurred on `rank`."""

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank


def on_all_ranks(action: Callable[[], T], mesh: Mesh) -> T:
    """Runs `action` on every rank and returns its local result.

    Collective over the world. If `action` raises a RecycleError or an OSError on any rank, every rank raises: a MachineFault
    when the error is transient (an unreachable file server, a full disk), otherwise a SharedError. If several ranks fail, the
    error of the highest one is raised. Any other exception propagates on its rank only, and the others wait in a collective.
    `action` may run collectives only if it fails on all ranks or on none.
    """
    text, transient, result = None, False, None
    try:
        result = action()
    except (RecycleError, OSError) as error:
        text = str(error) if isinstance(error, RecycleError) else f"{type(error).__name__}: {error}"
        transient = is_transient(error)
    votes = torch.tensor([mesh.rank + 1 if text is not None else 0], dtype=torch.int64, device=mesh.device)
    if mesh.world_size > 1:
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    failed = int(votes.item()) - 1  # the highest rank with an error, or -1
    if failed >= 0:
        text, transient = broadcast_from(failed, (text, transient), mesh)
        where = f" (rank {failed} on {broadcast_from(failed, socket.gethostname(), mesh)})" if failed else ""
        raise MachineFault(f"{text}{where}") if transient else SharedError(f"{text}{where}", failed)
    return result  # type: ignore[return-value]


def on_first_rank(action: Callable[[], T], mesh: Mesh) -> T | None:
    """Runs `action` on rank 0 while the other ranks wait, and returns its result there and None elsewhere.

    Collective over the world. Errors of rank 0 are raised on every rank, as in `on_all_ranks`.
    """
    return on_all_ranks(lambda: action() if mesh.is_first else None, mesh)


def broadcast_from(rank: int, value: T, mesh: Mesh) -> T:
    """Returns on every rank the `value` of rank `rank`. Collective over the world."""
    if mesh.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=rank, device=mesh.device)
    return values[0]
