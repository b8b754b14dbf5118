"""Gradient norms, clipping and skipped steps, alike at every ZeRO stage.

DeepSpeed clips by one global norm, and reports none at stage 0 in fp32. Its norm computation is therefore replaced inside its
step: norms are computed per part (backbone, recycle module), the clipping factors are stored in the optimizer's groups, and a
step with non-finite gradients suppresses the update on all ranks.

Each rank sums the squares of the gradients that only it counts: its ZeRO partition, its tensor shard (replicated weights count
on tensor rank 0), its pipeline stage (the tied embedding's copy counts on the first). One all-reduce over all ranks then covers
all parts. A collective per group, as in DeepSpeed, would not match across ranks: pipeline stages hold different parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recycle_ds.model import RecycleGPT
from recycle_ds.model.sharding import is_copy, is_sharded
from recycle_ds.training.engine.optimizer import PARTS, AdamW
from recycle_ds.training.engine.passes import Passes


@dataclass(frozen=True)
class GradientReport:
    """Norms before clipping: of all gradients, and by part. `applied` is False if the step changed no weight."""

    norm: float
    by_part: dict[str, float]
    applied: bool


class GradientControl:
    """Clips and skips the steps of one engine. clipping: largest norm, 0 for none. separate: clip each part by its own norm."""

    def __init__(
        self, engine: Any, model: RecycleGPT, optimizer: AdamW, passes: Passes, clipping: float, *, separate: bool
    ) -> None:
        self._optimizer, self._mesh, self._passes = optimizer, model.mesh, passes
        self._clipping, self._separate = clipping, separate
        self._counted = counted_parameters(model)
        self._device = next(model.parameters()).device
        self._accept: Callable[[float], bool] = math.isfinite
        self._report = GradientReport(0.0, {}, False)
        # DeepSpeed replaces the optimizer's list of groups during a step: keep the real ones
        self._groups = list(optimizer.param_groups)
        self._stage = engine.zero_optimization_stage()
        self._zero = engine.optimizer
        if self._stage in (1, 2):
            self._zero.scaled_global_norm = lambda *_: self._decide(self._norms_of_partitions())
        if hasattr(self._zero, "get_grads_for_norm"):  # BF16_Optimizer: unpartitioned fp32 gradients
            self._zero.get_grads_for_norm = lambda for_clipping=False: ([torch.zeros(1, device=self._device)], {})
        elif self._stage == 3:
            self._zero._get_norm_groups = lambda: [self._decide(self._norms_of_subgroups())]

    def step(self, accept: Callable[[float], bool]) -> GradientReport:
        """Runs DeepSpeed's step on the reduced gradients. Updates only if their norm is finite and accepted. Collective.

        accept: called once with the norm of all gradients; must return the same on all ranks.
        """
        self._accept = accept
        self._report = GradientReport(math.nan, {}, False)  # the result if DeepSpeed returns before it computes norms
        if self._stage == 0 or hasattr(self._zero, "get_grads_for_norm"):
            self._decide(self._norms_of_parameters())
        self._passes.take_step()
        self._optimizer.hold = True
        return self._report

    def _decide(self, local: list[tuple[str, list[Tensor]]]) -> Tensor:
        """Sets clipping factors and the hold flag from this rank's (part, norms). Collective; synchronises the device."""
        squares = torch.zeros(len(PARTS), dtype=torch.float64, device=self._device)
        for part, norms in local:
            if norms:
                squares[PARTS.index(part)] += torch.stack(norms).to(self._device, torch.float64).square().sum()
        if self._mesh.world_size > 1:
            dist.all_reduce(squares)
        norms_of = {part: math.sqrt(square) for part, square in zip(PARTS, squares.tolist(), strict=True)}
        total = math.sqrt(sum(norm**2 for norm in norms_of.values()))
        applied = self._accept(total) and math.isfinite(total)
        for group in self._groups:
            norm = norms_of[group["part"]] if self._separate else total
            clips = applied and self._clipping > 0 and norm > self._clipping
            group["clip"] = self._clipping / (norm + 1e-6) if clips else None
        self._optimizer.hold = not applied
        self._report = GradientReport(total, norms_of, applied)
        # on a non-finite norm DeepSpeed would skip the step in a way of its own: the hold flag does it instead
        return torch.tensor(total if math.isfinite(total) else 0.0)

    def _norms_of_partitions(self) -> list[tuple[str, list[Tensor]]]:
        """Stages 1 and 2: this rank's slices of the averaged gradients."""
        zero = self._zero
        found = []
        for index, group in enumerate(self._groups):
            members = zero.params_in_partition[index]
            if zero.cpu_offload:
                norms = self._offloaded(members)
            else:
                gradients = [g for g in zero.averaged_gradients[index] if not getattr(g, "_zero_padding", False)]
                # the last partitions are zero-padded if the group does not divide evenly; not all paths mark the padding
                assert len(members) <= len(gradients) <= len(members) + 1, "padding must be at the end of a partition"
                norms = self._norms(zip(members, gradients, strict=False))
            found.append((group["part"], norms))
        return found

    def _norms_of_subgroups(self) -> list[tuple[str, list[Tensor]]]:
        """Stage 3: this rank's slice of every gradient."""
        zero = self._zero
        found = []
        for index, members in enumerate(zero.fp16_groups):
            if zero.offload_optimizer:
                norms = self._offloaded(members)
            else:
                norms = self._norms(zip(members, zero.averaged_gradients[index], strict=True))
            found.append((self._groups[zero.sub_group_to_group_id[index]]["part"], norms))
        return found

    def _norms_of_parameters(self) -> list[tuple[str, list[Tensor]]]:
        """Stage 0, and 1 with fp32 accumulation: every replica holds all gradients, so only replica 0 counts."""
        if self._mesh.replicas.rank:
            return []
        if hasattr(self._zero, "fp32_groups_gradients"):
            members = zip(self._groups, self._zero.bf16_groups, self._zero.fp32_groups_gradients, strict=True)
            return [(group["part"], self._norms(zip(low, high, strict=True))) for group, low, high in members]
        groups = zip(self._groups, self._low_precision_groups(), strict=True)
        return [(group["part"], self._norms((p, p.grad) for p in members)) for group, members in groups]

    def _norms(self, pairs: Iterable[tuple[nn.Parameter, Tensor | None]]) -> list[Tensor]:
        kept = [gradient.float() for p, gradient in pairs if gradient is not None and p in self._counted]
        return list(torch._foreach_norm(kept)) if kept else []

    def _offloaded(self, members: Iterable[nn.Parameter]) -> list[Tensor]:
        """Norms that DeepSpeed computed when it moved gradients to the host; an unused parameter has none."""
        norms = self._zero.norm_for_param_grads
        ids = [self._zero.get_param_id(p) for p in members if p in self._counted]
        return [torch.as_tensor(norms[key]) for key in ids if key in norms]

    def _low_precision_groups(self) -> list[list[nn.Parameter]]:
        if hasattr(self._zero, "fp16_groups"):  # bf16: the optimizer's groups hold fp32 copies
            return self._zero.fp16_groups
        return [group["params"] for group in self._groups]


def counted_parameters(model: RecycleGPT) -> set[nn.Parameter]:
    """The parameters whose gradients count on this rank: sharded ones on every rank, replicated ones on one rank only."""
    mesh = model.mesh
    return {
        parameter
        for prefix, module in model.named_modules()
        for suffix, parameter in module.named_parameters(recurse=False)
        if (is_sharded(module, suffix) or mesh.tensor.rank == 0) and not is_copy(f"{prefix}.{suffix}", mesh)
    }
