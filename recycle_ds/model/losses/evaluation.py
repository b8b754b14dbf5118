"""The figures of an evaluation: cross entropy of the backbone and of the module by depth, acceptance of its drafts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.model.acceptance import EvaluationSums, judge
from recycle_ds.model.losses.cross_entropy import head_predictions
from recycle_ds.model.losses.draft_columns import DraftColumns
from recycle_ds.model.losses.settings import LossSettings
from recycle_ds.model.ulysses import gather_sequence


@torch.no_grad()
def evaluation_sums(
    states: Sequence[Tensor],
    targets_KBS: Tensor,
    weight: Tensor,
    settings: LossSettings,
    drafts: DraftColumns | None,
) -> EvaluationSums:
    """Sums over a batch, the same on all tensor and ulysses ranks.

    states: h and r^1..r^K, [S, B, D] each (a part of S under sequence parallelism). targets_KBS: [K+1, B, S]. weight:
    [V_local, D]. drafts: the vocabulary that the module's drafts are from, None for the complete one; its losses are only
    restricted to one that it is trained on (`settings.drafts`). Collective over the tensor and the ulysses axis.
    """
    targets = targets_KBS[: len(states)].transpose(1, 2)
    results = [
        _loss_and_choices(state.flatten(0, 1), target.flatten(), weight, settings, drafts if depth else None)
        for depth, (state, target) in enumerate(zip(states, targets, strict=True))
    ]
    loss = torch.stack([total for total, _ in results])
    best = torch.stack([tokens for _, tokens in results]).view(targets.shape)
    axis = settings.ulysses
    if axis.size > 1:  # drafts at the end of a part are compared with predictions of the next rank
        dist.all_reduce(loss, group=axis.group)
        targets = gather_sequence(targets.transpose(0, 1), axis).transpose(0, 1)
        best = gather_sequence(best.transpose(0, 1), axis).transpose(0, 1)
    counted = targets >= 0
    if settings.drafts is not None:  # other targets have no cross entropy
        counted[1:] &= settings.drafts.table[targets[1:].clamp_min(0)]
    return judge(loss, targets, best, counted)


def _loss_and_choices(
    states_ND: Tensor, targets_N: Tensor, weight: Tensor, settings: LossSettings, drafts: DraftColumns | None
) -> tuple[Tensor, Tensor]:
    """The sum of the cross entropy, and the likeliest token of each row [N], of `drafts` if there are any."""
    shard, chunk = settings.shard, settings.chunk
    if drafts is None:
        return head_predictions(states_ND, weight, targets_N, shard, chunk=chunk)
    rows, part = drafts.head(weight, shard)
    loss, best_N = head_predictions(states_ND, rows, drafts.number(targets_N), part, chunk=chunk)
    if settings.drafts is None:  # the module is trained on the complete vocabulary
        loss, _ = head_predictions(states_ND, weight, targets_N, shard, chunk=chunk)
    return loss, drafts.ids[best_N]
