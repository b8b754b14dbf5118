"""The loss of a training step: the backbone's cross entropy and the recycle module's objective at every depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from recycle_ds.config import RecycleConfig
from recycle_ds.model.losses.chunks import HeadShard
from recycle_ds.model.losses.cross_entropy import head_losses
from recycle_ds.model.losses.draft_columns import DraftColumns
from recycle_ds.model.losses.fused import FusedLosses
from recycle_ds.model.losses.module_losses import ModuleHead, module_losses
from recycle_ds.model.ulysses import gather_sequence
from recycle_ds.parallel.mesh import Axis, Mesh


def training_losses(
    states: Sequence[Tensor],
    targets_KBS: Tensor,
    scales: Tensor,
    weight: Tensor,
    shard: HeadShard,
    mesh: Mesh,
    recycle: RecycleConfig,
    *,
    chunk: int,
    draft: DraftColumns | None = None,
    fused: FusedLosses | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weighted total (scalar, differentiable) and the unweighted sums over rows [K+1]; for a module with a confidence layer
    also where its likeliest token is the backbone's, bool [K, N] for the N rows of all tensor ranks.

    states: h and r^1..r^K, [S, B, D] each (a part of S under sequence parallelism). targets_KBS: [K+1, B, S]. scales: [K+1],
    the weight of one row's loss. weight: [V_local, D]. draft: None for the complete vocabulary. fused: compiled functions, if
    training compiles. Collective over the tensor and the ulysses axis.
    """
    targets = targets_KBS[: len(states)].transpose(1, 2).flatten(1)
    joint = recycle.gradient == "joint"
    hidden, *module = states
    if not module or (recycle.objective == "cross_entropy" and draft is None and not recycle.confidence):
        total, sums = head_losses(
            [state.flatten(0, 1) for state in states],
            weight,
            targets,
            scales,
            shard,
            chunk=chunk,
            train_head=[index == 0 or joint for index in range(len(states))],
            fused=fused,
        )
        return total, sums, None
    frozen = recycle.gradient == "frozen_backbone"
    teacher = None
    if frozen or recycle.objective != "cross_entropy" or recycle.confidence:
        teacher = _ahead(hidden.detach(), len(module), shard, mesh.ulysses).flatten(0, 1)
    counted = targets[1:] >= 0
    if draft is not None and recycle.objective == "cross_entropy":
        counted = counted & draft.table[targets[1:].clamp_min(0)]
    complete = HeadShard(shard.first, shard.valid, shard.axis)
    columns = None if draft is None else draft.columns
    head = ModuleHead(
        recycle.objective, complete, columns, chunk, joint, compare_choices=recycle.confidence, fused=fused
    )
    if shard.scattered:
        module = [gather_from_sequence_parallel_region(r, False, shard.axis.group) for r in module]
    rows = [r.flatten(0, 1) for r in module]
    total, sums, agrees = module_losses(teacher, rows, weight, targets, counted, scales, head)
    found = agrees if recycle.confidence else None
    if frozen:  # the backbone's loss has no weight, and is known from the comparison
        return total, sums, found
    own, own_sums = head_losses(
        [hidden.flatten(0, 1)], weight, targets[:1], scales[:1], shard, chunk=chunk, train_head=[True], fused=fused
    )
    return total + own, torch.cat((own_sums, sums[1:])), found


def _ahead(hidden_SBD: Tensor, depth: int, shard: HeadShard, ulysses: Axis) -> Tensor:
    """The backbone's states at this rank's positions and the `depth` after them [S + depth, B, D]; zeros beyond the end."""
    if shard.scattered:
        hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, False, shard.axis.group)
    length = len(hidden_SBD)
    if ulysses.size > 1:
        hidden_SBD = gather_sequence(hidden_SBD, ulysses)[ulysses.rank * length :][: length + depth]
    return F.pad(hidden_SBD, (0, 0, 0, 0, 0, length + depth - len(hidden_SBD)))
