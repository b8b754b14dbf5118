"""Errors that all ranks hear of: whichever rank meets one, every rank raises it, and none waits for ever."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from recycle_ds.config import RecycleError
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.peers import MachineFault

T = TypeVar("T")
# Of file servers that are away (NFS, Lustre, FUSE), and of disks that are full or broken.
_PASSING = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EHOSTDOWN, errno.ESHUTDOWN,
    errno.ENOTCONN,
)  # fmt: skip


class SharedError(RecycleError):
    """An error that all ranks raise alike; `rank` met it."""

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank


def together(action: Callable[[], T], mesh: Mesh, device: torch.device) -> T:
    """Runs `action` on every rank; a RecycleError or an error of the file system on any becomes a SharedError on all, or a
    MachineFault where it is one that may pass (an unreachable server, a full disk).

    Collective; `action` itself may be collective only where it fails alike.
    """
    text, passing, result = None, False, None
    try:
        result = action()
    except (RecycleError, OSError) as error:
        text = str(error) if isinstance(error, RecycleError) else f"{type(error).__name__}: {error}"
        passing = _may_pass(error)
    votes = torch.tensor([mesh.rank + 1 if text else 0], dtype=torch.int64, device=device)
    if mesh.world_size > 1:
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    culprit = int(votes.item()) - 1
    if culprit >= 0:
        text, passing = from_rank(culprit, (text, passing), mesh, device)
        where = f" (rank {culprit} on {from_rank(culprit, socket.gethostname(), mesh, device)})" if culprit else ""
        raise MachineFault(f"{text}{where}") if passing else SharedError(f"{text}{where}", culprit)
    return result  # type: ignore[return-value]


def on_first_rank(action: Callable[[], T], mesh: Mesh, device: torch.device) -> T | None:
    """Runs `action` on rank 0 while the others wait; None on those. Errors as in `together`. Collective."""
    return together(lambda: action() if mesh.is_first else None, mesh, device)


def from_rank(rank: int, value: T, mesh: Mesh, device: torch.device) -> T:
    """What one rank holds, on all ranks. Collective."""
    if mesh.world_size == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=rank, device=device)
    return told[0]


def _may_pass(error: BaseException | None) -> bool:
    """Whether a fault of a file system that may pass is behind an error, whoever has put it in other words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__ or error.__context__
    return False
