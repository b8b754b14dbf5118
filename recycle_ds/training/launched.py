"""A step between its launch and its end: what its ranks share, and what the host reads of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.parallel.device import upload
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.faults.stop_requests import REASONS
from recycle_ds.training.state import TrainingState


@dataclass(frozen=True)
class Shared:
    """What the ranks have added up, on the device. sums: of the global batch's losses. votes: see `agreed`."""

    sums: Tensor
    votes: Tensor


@dataclass(frozen=True)
class Launched:
    """A step that was launched. before: the state before it. number: see `StepStart`. start: when, in seconds. weights: of the
    losses. rate: learning rate."""

    before: TrainingState
    number: int
    start: float
    weights: tuple[float, ...]
    rate: float
    read: Callable[[], list[list[float]]]
    """Waits for the shared sums and votes, the number of targets by depth, and the report on the gradients."""

    @property
    def step(self) -> int:
        """Its step of the run."""
        return self.before.step + 1


def runs_ahead(device: torch.device) -> bool:
    """Whether steps can be launched before the one before has ended. A CPU computes them then: nothing would be gained."""
    return device.type == "cuda"


def share(sums: Tensor, reason: str | None, *, writing: bool, mesh: Mesh) -> Shared:
    """Adds up the losses of all ranks, and lets them vote. One collective over all ranks, for which a GPU's host does not wait.

    sums: this rank's losses, float64. reason: why this rank would stop. writing: whether it is still writing a checkpoint.
    """
    flags = [*(reason == name for name in REASONS), writing]
    votes = upload(torch.tensor(flags, dtype=torch.float64), mesh.device)
    # every tensor rank of the last stage has the same sums: only one of them may count
    counts = mesh.last_stage and mesh.tensor.rank == 0
    shared = torch.cat((sums if counts else torch.zeros_like(sums), votes))
    if mesh.world_size > 1:
        dist.all_reduce(shared)
    return Shared(shared[: len(sums)], shared[len(sums) :])


def agreed(votes: Sequence[float]) -> tuple[str, bool]:
    """The reason to stop, "" for none, and whether any rank is still writing a checkpoint."""
    *counted, writing = votes
    reasons = [name for name, count in zip(REASONS, counted, strict=True) if count]
    return reasons[-1] if reasons else "", bool(writing)


def total_loss(losses: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted loss that is optimised; NaN if any of them is not finite, also one whose weight is 0."""
    if not math.isfinite(sum(losses)):
        return math.nan
    # confidence losses, which come last, carry no weight
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=False))
