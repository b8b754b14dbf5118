"""One optimizer step's micro-batches with the scales that make losses and gradients independent of how the batch is split.

The cross entropy of depth k is the sum over the unmasked targets of the global batch divided by their number in the global
batch. That number is known before the first backward pass, since masks are a function of the data: each micro-batch's sum is
divided by it. A mean of means would depend on micro-batch size, data-parallel size and packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.data.loader import Batch
from recycle_ds.parallel.device import upload
from recycle_ds.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepBatches:
    """A rank's micro-batches, on its device. counts [K+1]: targets of the global batch by depth, float64, on the host unless
    they were summed over ranks."""

    micro: list[Batch]
    counts: Tensor
    device: torch.device

    def scales(self, weights: Sequence[float], replicas: int) -> Tensor:
        """[K+1] fp32: weight of one target in the total, times `replicas`, over which DeepSpeed averages gradients."""
        weight = upload(torch.tensor(weights, dtype=torch.float64), self.counts.device)
        scales = (weight * replicas / self.counts.clamp_min(1)).float()
        return upload(scales, self.device) if scales.device != self.device else scales

    @staticmethod
    def means(sums: Sequence[float], counts: Sequence[float]) -> list[float]:
        """Mean losses from the global batch's sums, as `RecycleGPT.train_losses` orders them, and the counts; 0 for a depth
        without targets."""
        # without a confidence layer there are fewer sums
        return [total / max(1.0, count) for total, count in zip(sums, [*counts, *counts[1:]], strict=False)]


def assemble(micro: Sequence[Batch], losses: int, mesh: Mesh, counted_V: Tensor | None = None) -> StepBatches:
    """Moves a rank's micro-batches to its device and counts the global batch's targets. Collective over the data axis.

    With Ulysses a rank keeps its part of every sequence; the counts are those of the full sequences. counted_V: bool, the
    tokens that count as targets of the recycle module; None for all.
    """
    counts = torch.zeros(losses, dtype=torch.float64)
    for batch in micro:
        counted = batch.targets_KBS[:losses] >= 0
        if counted_V is not None:
            counted[1:] &= counted_V[batch.targets_KBS[1:losses].clamp_min(0)]
        counts += counted.flatten(1).sum(1)
    if mesh.data.size > 1:
        counts = upload(counts, mesh.device)
        dist.all_reduce(counts, group=mesh.data.group)
    return StepBatches(local_batches(micro, mesh), counts, mesh.device)


def local_batches(micro: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """This rank's part of its micro-batches (with Ulysses, of every sequence), on its device."""
    return [batch.part(mesh.ulysses.rank, mesh.ulysses.size).to(mesh.device) for batch in micro]
