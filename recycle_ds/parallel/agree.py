"""Work that one rank does while the others wait, and the verdict they all share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from recycle_ds.config import RecycleError
from recycle_ds.parallel.mesh import Mesh


def on_first_rank(action: Callable[[], None], mesh: Mesh, device: torch.device) -> None:
    """Runs `action` on rank 0. Its RecycleError is raised on every rank, so that none waits for ever. Collective."""
    told: list[str | None] = [None]
    error: RecycleError | None = None
    if mesh.is_first:
        try:
            action()
        except RecycleError as caught:
            error, told = caught, [str(caught)]
    if mesh.world_size > 1:
        dist.broadcast_object_list(told, src=0, device=device)
    if error is not None:
        raise error
    if told[0] is not None:
        raise RecycleError(told[0])
