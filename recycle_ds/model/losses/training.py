"""The losses of a training pass: of the backbone, of the recycle module at every depth, and of its confidence layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from recycle_ds.model.losses.chunks import HeadShard
from recycle_ds.model.losses.confidence import confidence_losses
from recycle_ds.model.losses.cross_entropy import head_losses
from recycle_ds.model.losses.module_losses import ModuleHead, module_losses
from recycle_ds.model.losses.settings import LossSettings
from recycle_ds.model.ulysses import gather_sequence
from recycle_ds.parallel.mesh import Axis


def training_losses(
    states: Sequence[Tensor],
    targets_KBS: Tensor,
    scales: Tensor,
    weight: Tensor,
    settings: LossSettings,
    confidence: nn.Linear | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted total (scalar, differentiable) and the unweighted sums over rows [1 + K] without a gradient: the
    backbone's cross entropy, then the module's objective by depth. With a confidence layer, its loss by depth follows,
    [1 + 2 K].

    states: h and r^1..r^K, [S, B, D] each (a part of S under sequence parallelism). targets_KBS: [K+1, B, S]. scales:
    [K+1], the weight of one row's loss. weight: [V_local, D]. Collective over the tensor and the ulysses axis.
    """
    recycle, shard, chunk, fused = settings.recycle, settings.shard, settings.chunk, settings.fused
    targets = targets_KBS[: len(states)].transpose(1, 2).flatten(1)
    joint = recycle.gradient == "joint"
    hidden, *module = states
    if not module or (recycle.objective == "cross_entropy" and settings.drafts is None and confidence is None):
        return head_losses(
            [state.flatten(0, 1) for state in states],
            weight,
            targets,
            scales,
            shard,
            chunk=chunk,
            train_head=[index == 0 or joint for index in range(len(states))],
            fused=fused,
        )
    frozen = recycle.gradient == "frozen_backbone"
    teacher = None
    if frozen or recycle.objective != "cross_entropy" or confidence is not None:
        teacher = _ahead(hidden.detach(), len(module), shard, settings.ulysses).flatten(0, 1)
    valid = targets[1:] >= 0
    counted = valid
    if settings.drafts is not None and recycle.objective == "cross_entropy":
        counted = valid & settings.drafts.table[targets[1:].clamp_min(0)]
    complete = HeadShard(shard.first, shard.valid, shard.axis)
    columns = None if settings.drafts is None else settings.drafts.columns
    head = ModuleHead(
        recycle.objective, complete, columns, chunk, joint, compare_choices=confidence is not None, fused=fused
    )
    if shard.scattered:  # every tensor rank sees all rows, so that the confidence layer's gradient is complete too
        module = [gather_from_sequence_parallel_region(r, False, shard.axis.group) for r in module]
    rows = [r.flatten(0, 1) for r in module]
    total, sums, agrees = module_losses(teacher, rows, weight, targets, counted, scales, head)
    if not frozen:  # a frozen backbone's loss has no weight, and is known from the comparison
        own, own_sums = head_losses(
            [hidden.flatten(0, 1)], weight, targets[:1], scales[:1], shard, chunk=chunk, train_head=[True], fused=fused
        )
        total, sums = total + own, torch.cat((own_sums, sums[1:]))
    if confidence is None:
        return total, sums
    logits = torch.stack([confidence(r.detach()).flatten() for r in module])
    loss, by_depth = confidence_losses(logits, agrees, valid, scales[1:])
    return total + loss, torch.cat((sums, by_depth.to(sums.dtype)))


def _ahead(hidden_SBD: Tensor, depth: int, shard: HeadShard, ulysses: Axis) -> Tensor:
    """The backbone's states at this rank's positions and the `depth` after them [S + depth, B, D]; zeros beyond the end."""
    if shard.scattered:
        hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, False, shard.axis.group)
    length = len(hidden_SBD)
    if ulysses.size > 1:
        hidden_SBD = gather_sequence(hidden_SBD, ulysses)[ulysses.rank * length :][: length + depth]
    return F.pad(hidden_SBD, (0, 0, 0, 0, 0, length + depth - len(hidden_SBD)))
