"""Gradient norms, clipping and the decision to skip, alike for every ZeRO stage.

DeepSpeed clips by one global norm and reports none at stage 0 in fp32. Here its norm computation is replaced where it happens,
inside `engine.step()`: norms are taken per part, the clipping factors go into the optimizer's groups, and a step whose
gradients are not finite holds the optimizer on all ranks alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recycle_ds.model.sharding import is_sharded
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.optimizer import AdamW


@dataclass(frozen=True)
class GradientReport:
    """Norms before clipping: of all gradients, and by part. `applied` is False where the step changed nothing."""

    norm: float
    by_part: dict[str, float]
    applied: bool


class GradientControl:
    """Owns clipping and skipping of one engine. `clipping` 0 clips nothing; `separate` clips parts by their own norms."""

    def __init__(self, engine: Any, optimizer: AdamW, mesh: Mesh, clipping: float, *, separate: bool) -> None:
        self._engine, self._optimizer, self._mesh = engine, optimizer, mesh
        self._clipping, self._separate = clipping, separate
        self._skip = False
        self._report = GradientReport(0.0, {}, False)
        # DeepSpeed's steps swap the optimizer's list of groups: keep the real ones
        self._groups = list(optimizer.param_groups)
        self._stage = engine.zero_optimization_stage()
        self._zero = engine.optimizer
        if self._stage in (1, 2):
            self._zero.scaled_global_norm = self._norm_of_partitions
        elif self._stage == 3:
            self._zero._get_norm_groups = self._norms_of_subgroups
        self._sharded = _sharded_parameters(engine.module)

    def step(self, *, skip: bool) -> GradientReport:
        """Takes `engine.step()` at a gradient-accumulation boundary. `skip` holds the optimizer whatever the norms say."""
        self._skip = skip
        self._report = GradientReport(math.nan, {}, False)  # what stands if DeepSpeed leaves before it asks for norms
        if self._stage == 0:
            self._decide(self._norms_of_parameters())
        self._engine.step()
        self._optimizer.hold = True
        return self._report

    def _decide(self, squares: list[tuple[str, Tensor]]) -> Tensor:
        """Sets factors and the hold flag from (part, squared norm) pairs. Reading the norms synchronises the device."""
        by_part: dict[str, float] = {}
        for (part, _), square in zip(squares, torch.stack([s for _, s in squares]).tolist(), strict=True):
            by_part[part] = by_part.get(part, 0.0) + square
        norms = {part: math.sqrt(square) if square >= 0 else math.nan for part, square in by_part.items()}
        total = math.sqrt(sum(norm**2 for norm in norms.values()))
        applied = math.isfinite(total) and not self._skip
        for group in self._groups:
            norm = norms[group["part"]] if self._separate else total
            clips = applied and self._clipping > 0 and norm > self._clipping
            group["clip"] = self._clipping / (norm + 1e-6) if clips else None
        self._optimizer.hold = not applied
        self._report = GradientReport(total, norms, applied)
        # DeepSpeed would take its own way out of a step on an invalid norm: the hold flag is ours
        return torch.tensor(total if math.isfinite(total) else 0.0)

    def _norm_of_partitions(self, norm_type: int = 2) -> Tensor:
        """Stages 1 and 2, in place of scaled_global_norm."""
        zero = self._zero
        norms = []
        for index, group in enumerate(self._groups):
            if zero.cpu_offload:
                norm = zero.complete_grad_norm_calculation_for_cpu_offload(zero.params_in_partition[index])
            else:
                norm = zero.get_grad_norm_direct(zero.averaged_gradients[index], zero.params_in_partition[index])
            norms.append((group["part"], _square(norm)))
        return self._decide(norms)

    def _norms_of_subgroups(self) -> list[Tensor]:
        """Stage 3, in place of _get_norm_groups."""
        zero = self._zero
        norms = []
        for index, members in enumerate(zero.fp16_groups):
            if zero.offload_optimizer:
                norm = zero.complete_grad_norm_calculation_for_cpu_offload(members)
            else:
                norm = zero.get_grad_norm_direct(zero.averaged_gradients[index], members)
            norms.append((self._groups[zero.sub_group_to_group_id[index]]["part"], _square(norm)))
        return [self._decide(norms)]

    def _norms_of_parameters(self) -> list[tuple[str, Tensor]]:
        """Stage 0: every data-parallel rank holds all gradients; tensor-parallel copies count once."""
        norms = []
        for group, members in zip(self._groups, self._low_precision_groups(), strict=True):
            kept = [
                p.grad.float()
                for p in members
                if p.grad is not None and (p in self._sharded or self._mesh.tensor.rank == 0)
            ]
            device = members[0].device
            square = torch.zeros((), device=device)
            if kept:
                square = torch.stack(torch._foreach_norm(kept)).square().sum()
            if self._mesh.tensor.size > 1:
                dist.all_reduce(square, group=self._mesh.tensor.group)
            norms.append((group["part"], square))
        return norms

    def _low_precision_groups(self) -> list[list[nn.Parameter]]:
        if hasattr(self._zero, "fp16_groups"):  # bf16: the optimizer's groups hold fp32 copies
            return self._zero.fp16_groups
        return [group["params"] for group in self._groups]


def _square(norm: Any) -> Tensor:
    """DeepSpeed reports an infinite or NaN norm as -1; keep it negative so that it is seen."""
    norm = torch.as_tensor(norm, dtype=torch.float32)
    return torch.where(norm >= 0, norm.square(), torch.full_like(norm, -math.inf))


def _sharded_parameters(model: nn.Module) -> set[nn.Parameter]:
    return {
        parameter
        for module in model.modules()
        for suffix, parameter in module.named_parameters(recurse=False)
        if is_sharded(module, suffix)
    }
