"""Gradient norms, clipping and skipped steps, alike at every ZeRO stage.

DeepSpeed clips by one global norm, and reports none at stage 0 in fp32. Its norm computation is therefore replaced inside its
step (see `zero`): norms are computed per part (backbone, recycle module), the clipping factors are stored in the optimizer's
groups, and a step with non-finite gradients suppresses the update on all ranks.

Each rank sums the squares of the gradients that only it counts: its ZeRO partition, its tensor shard (replicated weights count
on tensor rank 0), its pipeline stage (the tied embedding's copy counts on the first). One all-reduce over all ranks then covers
all parts. A collective per group, as in DeepSpeed, would not match across ranks: pipeline stages hold different parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from recycle_ds.model import RecycleGPT
from recycle_ds.model.sharding import is_copy, is_sharded
from recycle_ds.training.engine.optimizer import PARTS, AdamW
from recycle_ds.training.engine.passes import Passes
from recycle_ds.training.engine.zero.adapter import ZeroAdapter


@dataclass(frozen=True)
class GradientReport:
    """Norms before clipping: of all gradients, and by part. `applied` is False if the step changed no weight."""

    norm: float
    by_part: dict[str, float]
    applied: bool


class GradientControl:
    """Clips and skips the steps of one engine. clipping: largest norm, 0 for none. separate: clip each part by its own norm."""

    def __init__(
        self, zero: ZeroAdapter, model: RecycleGPT, optimizer: AdamW, passes: Passes, clipping: float, *, separate: bool
    ) -> None:
        self._zero, self._optimizer, self._mesh, self._passes = zero, optimizer, model.mesh, passes
        self._clipping, self._separate = clipping, separate
        self._counted = counted_parameters(model)
        self._device = next(model.parameters()).device
        self._accept: Callable[[float], bool] = math.isfinite
        self._report = GradientReport(0.0, {}, False)
        zero.replace_norm(self._decide)

    def step(self, accept: Callable[[float], bool]) -> GradientReport:
        """Runs DeepSpeed's step on the reduced gradients. Updates only if their norm is finite and accepted. Collective.

        accept: called once with the norm of all gradients; must return the same on all ranks.
        """
        self._accept = accept
        self._report = GradientReport(math.nan, {}, False)  # the result if DeepSpeed returns before it computes norms
        self._zero.step(self._passes.take_step)
        self._optimizer.hold = True
        return self._report

    def _decide(self) -> float:
        """Sets clipping factors and the hold flag. Collective; synchronises the device. Returns the norm for DeepSpeed."""
        squares = torch.zeros(len(PARTS), dtype=torch.float64, device=self._device)
        for part, norms in self._zero.norms(self._counted):
            if norms:
                squares[PARTS.index(part)] += torch.stack(norms).to(self._device, torch.float64).square().sum()
        if self._mesh.world_size > 1:
            dist.all_reduce(squares)
        norms_of = {part: math.sqrt(square) for part, square in zip(PARTS, squares.tolist(), strict=True)}
        total = math.sqrt(sum(norm**2 for norm in norms_of.values()))
        applied = self._accept(total) and math.isfinite(total)
        factors = {part: self._factor(norm if self._separate else total) for part, norm in norms_of.items()}
        self._zero.clip(factors if applied else dict.fromkeys(PARTS))
        self._optimizer.hold = not applied
        self._report = GradientReport(total, norms_of, applied)
        # on a non-finite norm DeepSpeed would skip the step in a way of its own: the hold flag does it instead
        return total if math.isfinite(total) else 0.0

    def _factor(self, norm: float) -> float | None:
        return self._clipping / (norm + 1e-6) if 0 < self._clipping < norm else None


def counted_parameters(model: RecycleGPT) -> set[nn.Parameter]:
    """The parameters whose gradients count on this rank: sharded ones on every rank, replicated ones on one rank only."""
    mesh = model.mesh
    return {
        parameter
        for prefix, module in model.named_modules()
        for suffix, parameter in module.named_parameters(recurse=False)
        if (is_sharded(module, suffix) or mesh.tensor.rank == 0) and not is_copy(f"{prefix}.{suffix}", mesh)
    }
