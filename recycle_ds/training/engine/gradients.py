"""Gradient norms, clipping and skipped steps, alike at every ZeRO stage.

DeepSpeed clips by one global norm, and reports none at stage 0 in fp32. Its norm computation is therefore replaced inside its
step (see `zero`): norms are computed per part (backbone, recycle module), and AdamW's kernel divides by what clips them. A step
whose losses or gradients are not finite changes nothing on any rank. The device finds out by itself: the host need not wait
for the norms before it goes on.

Each rank sums the squares of the gradients that only it counts: its ZeRO partition, its tensor shard (replicated weights count
on tensor rank 0), its pipeline stage (the tied embedding's copy counts on the first). One all-reduce over all ranks then covers
all parts. A collective per group, as in DeepSpeed, would not match across ranks: pipeline stages hold different parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

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

    @classmethod
    def of(cls, numbers: Sequence[float]) -> GradientReport:
        """The report that `GradientControl.step` has returned, on the host."""
        *squares, applied = numbers
        norms = {part: math.sqrt(square) for part, square in zip(PARTS, squares, strict=True)}
        return cls(math.sqrt(sum(squares)), norms, bool(applied))


class GradientControl:
    """Clips and skips the steps of one engine. clipping: largest norm, 0 for none. separate: clip each part by its own norm."""

    def __init__(
        self, zero: ZeroAdapter, model: RecycleGPT, optimizer: AdamW, passes: Passes, clipping: float, *, separate: bool
    ) -> None:
        self._zero, self._optimizer, self._mesh, self._passes = zero, optimizer, model.mesh, passes
        self._clipping, self._separate = clipping, separate
        self._counted = counted_parameters(model)
        self._device = next(model.parameters()).device
        self._finite: Tensor | None = None
        self._accept: Callable[[float], bool] | None = None
        self._report = self._nothing()
        zero.replace_norm(self._decide)

    def step(self, finite: Tensor | None = None, accept: Callable[[float], bool] | None = None) -> Tensor:
        """Runs DeepSpeed's step on the reduced gradients. Updates only if their norm is finite and accepted. Collective.

        finite: bool scalar on the device, whether the losses are; None if that is known. accept: called once with the norm of
        all gradients, for which the host waits; must return the same on all ranks. None accepts every finite norm, without
        waiting. Returns numbers on the device, see `GradientReport.of`.
        """
        self._finite, self._accept = finite, accept
        self._report = self._nothing()  # the result if DeepSpeed returns before it computes norms
        self._zero.step(self._passes.take_step)
        self._optimizer.hold = True
        return self._report

    def drop(self) -> None:
        """Forgets the gradients of a step that must not be applied. Collective."""
        self.step(accept=lambda _: False)

    def _nothing(self) -> Tensor:
        """The report of a step without gradients."""
        return torch.tensor([math.nan] * len(PARTS) + [0.0], dtype=torch.float64)

    def _decide(self) -> float:
        """Lets the optimizer clip or hold. Collective. Returns a norm for DeepSpeed, which does nothing with it."""
        squares = torch.zeros(len(PARTS), dtype=torch.float64, device=self._device)
        for part, norms in self._zero.norms(self._counted):
            if norms:
                squares[PARTS.index(part)] += torch.stack(norms).to(self._device, torch.float64).square().sum()
        if self._mesh.world_size > 1:
            dist.all_reduce(squares)
        total = squares.sum()
        applied = total.isfinite() if self._finite is None else total.isfinite() & self._finite
        self._optimizer.hold = self._accept is not None and not self._accept(math.sqrt(total.item()))
        self._optimizer.held = (~applied).float()
        if self._clipping:
            norms_P = squares.sqrt() if self._separate else total.sqrt().expand(len(PARTS))
            too_long_by = (norms_P + 1e-6) / self._clipping
            divisors_P = torch.where(norms_P > self._clipping, too_long_by, 1.0).float()
            self._optimizer.divisors = dict(zip(PARTS, divisors_P.unbind(), strict=True))
        self._report = torch.cat((squares, (applied & (not self._optimizer.hold)).double()[None]))
        return 0.0


def counted_parameters(model: RecycleGPT) -> set[nn.Parameter]:
    """The parameters whose gradients count on this rank: sharded ones on every rank, replicated ones on one rank only."""
    mesh = model.mesh
    return {
        parameter
        for prefix, module in model.named_modules()
        for suffix, parameter in module.named_parameters(recurse=False)
        if (is_sharded(module, suffix) or mesh.tensor.rank == 0) and not is_copy(f"{prefix}.{suffix}", mesh)
    }
