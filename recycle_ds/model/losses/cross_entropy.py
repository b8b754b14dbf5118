"""Output head and cross entropy in chunks of rows, so that the logits of all rows never exist at once.

The gradient of the summed cross entropy with respect to the logits, (softmax - onehot) scaled per row, is known as soon as a
chunk's logits are. The forward pass therefore also computes the gradients of states and head, and frees the logits. This takes
three matrix products per chunk (logits, gradient of the states, gradient of the head); recomputing the logits in the backward
pass would take four.

The vocabulary may be split over the tensor axis (Megatron-LM, arXiv 1909.08053, section 3): the softmax communicates only each
row's maximum, sum of exponentials and target logit. Padding rows of the vocabulary are never predicted.

Under sequence parallelism each tensor rank holds the states of its part of the sequence. A chunk then gathers rows from every
rank, which are not contiguous in the sequence; targets and results are indexed in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.data.targets import IGNORE
from recycle_ds.model.losses.chunks import HeadGradient, HeadShard, global_argmax, reduce
from recycle_ds.model.losses.fused import FusedLosses
from recycle_ds.parallel.products import upcasts

_ROWS_IN_CACHE = 32
"""Rows of logits that a CPU processes together, to keep them in its cache: 2 MiB for a vocabulary of 16,384."""


@dataclass(frozen=True)
class ChunkLogits:
    """One chunk after the softmax: exponentials [n, V_local], their row sums `total` [n], loss [n].

    rows: the chunk's rows on this rank. states: [n, D], gathered over the tensor axis if scattered. column: [n], the target's
    column on this rank, valid where `owned`. best: [n], the argmax token, if requested.
    """

    rows: slice
    states: Tensor
    exponentials: Tensor
    total: Tensor
    loss: Tensor
    column: Tensor
    owned: Tensor
    best: Tensor | None


def head_losses(
    hiddens: Sequence[Tensor],
    weight: Tensor,
    targets: Tensor,
    scales: Tensor,
    shard: HeadShard,
    *,
    chunk: int,
    train_head: Sequence[bool],
    fused: FusedLosses | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropies of several states under one head.

    hiddens: J tensors [N, D], the backbone's states and those of each recycle depth ([N / p, D] if scattered over p ranks).
    weight: [V_local, D]. targets: [J, N], IGNORE for rows without a target. scales: [J], the weight of one row's loss in the
    total. train_head: J flags, whether these rows contribute to the head's gradient. chunk: rows of logits in memory at once.
    fused: compiled functions, for a head that is not split.

    Returns the weighted total (scalar, differentiable) and the unweighted sums over rows [J] (no gradient), both fp32.
    Collective over the tensor axis.
    """
    total, sums = _HeadLosses.apply(weight, targets, scales, shard, chunk, tuple(train_head), fused, *hiddens)
    return total, sums


@torch.no_grad()
def head_predictions(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: HeadShard, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """For evaluation: the sum of the cross entropy over rows with a target (scalar), and the argmax of each row [N].

    Collective over the tensor axis.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    best = torch.empty_like(targets)
    for part in _chunks(hidden, weight, targets, shard, chunk, want_best=True):
        total += part.loss.sum()
        assert part.best is not None
        by_rank = best.view(-1, hidden.shape[0])[:, part.rows]
        by_rank.copy_(part.best.view_as(by_rank))
    return total, best


class _HeadLosses(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        targets: Tensor,
        scales: Tensor,
        shard: HeadShard,
        chunk: int,
        train_head: tuple[bool, ...],
        fused: FusedLosses | None,
        *hiddens: Tensor,
    ) -> tuple[Tensor, Tensor]:
        want_weight = ctx.needs_input_grad[0]
        want_hidden = ctx.needs_input_grad[7:]
        sums = torch.zeros(len(hiddens), dtype=torch.float32, device=weight.device)
        head = HeadGradient(weight)
        grads: list[Tensor | None] = []
        for index, hidden in enumerate(hiddens):
            head_gradient = head if want_weight and train_head[index] else None
            grad = torch.empty_like(hidden) if want_hidden[index] else None
            trains = grad is not None or head_gradient is not None
            if fused is not None and trains and shard.axis.size == 1 and not upcasts(hidden):
                sums[index] = _fused_losses(
                    fused, hidden, weight, targets[index], scales[index], shard, chunk, grad, head_gradient
                )
                grads.append(grad)
                continue
            for part in _chunks(hidden, weight, targets[index], shard, chunk, want_best=False):
                sums[index] += part.loss.sum()
                if grad is not None or head_gradient is not None:
                    _chunk_gradients(part, weight, shard, scales[index], grad, head_gradient)
            if grad is not None and shard.axis.size > 1 and not shard.scattered:
                dist.all_reduce(grad, group=shard.axis.group)
            grads.append(grad)
        ctx.save_for_backward(head.total() if want_weight else None, *grads)
        ctx.mark_non_differentiable(sums)
        return torch.dot(sums, scales), sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_weight, *grads = ctx.saved_tensors
        scaled = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in (grad_weight, *grads)]
        return (scaled[0], None, None, None, None, None, None, *scaled[1:])


def _fused_losses(
    fused: FusedLosses,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    shard: HeadShard,
    chunk: int,
    grad: Tensor | None,
    head_gradient: HeadGradient | None,
) -> Tensor:
    """The sum of the losses of all rows, and their gradients, with the compiled functions."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        loss, error = fused.cross_entropy(F.linear(hidden[rows], weight), targets[rows], scale, shard.valid)
        total += loss.sum()
        if grad is not None:
            torch.mm(error, weight, out=grad[rows])
        if head_gradient is not None:
            head_gradient.add(error, hidden[rows])
    return total


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: HeadShard, chunk: int, *, want_best: bool
) -> Iterator[ChunkLogits]:
    ranks = shard.axis.size if shard.scattered else 1
    by_rank = targets.view(ranks, -1)
    step = max(1, chunk // ranks)
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, min(start + step, hidden.shape[0]))
        states = _gathered(hidden[rows], shard)
        logits = F.linear(states.float(), weight.float()) if upcasts(states) else F.linear(states, weight).float()
        if shard.valid < logits.shape[1]:
            logits[:, shard.valid :] = float("-inf")
        yield _softmax(logits, by_rank[:, rows].flatten(), rows, states, shard, want_best)


def _gathered(states: Tensor, shard: HeadShard) -> Tensor:
    """The chunk's rows of all tensor ranks, in rank order."""
    if not shard.scattered:
        return states
    gathered = states.new_empty(shard.axis.size * states.shape[0], states.shape[1])
    dist.all_gather_into_tensor(gathered, states.contiguous(), group=shard.axis.group)
    return gathered


def _softmax(
    logits: Tensor, targets: Tensor, rows: slice, states: Tensor, shard: HeadShard, want_best: bool
) -> ChunkLogits:
    """Cross entropy of a chunk; `logits` is overwritten by its exponentials."""
    if shard.axis.size == 1 and logits.device.type == "cpu" and not want_best:
        return _softmax_in_cache(logits, targets, rows, states)
    if logits.shape[1] and shard.valid:
        peak, local_best = logits.max(dim=1)
    else:  # a rank that holds padding only
        peak, local_best = logits.new_full((logits.shape[0],), float("-inf")), torch.zeros_like(targets)
    best = None
    if want_best:
        best = global_argmax(peak, local_best + shard.first, shard.axis)
    reduce(peak, dist.ReduceOp.MAX, shard.axis)
    column = targets - shard.first
    owned = (column >= 0) & (column < shard.valid)
    column = column.clamp(0, max(shard.valid - 1, 0))
    target_logit = (logits.gather(1, column[:, None]).squeeze(1) - peak).masked_fill(~owned, 0.0)
    exponentials = logits.sub_(peak[:, None]).exp_()
    total = exponentials.sum(dim=1)
    reduce(total, dist.ReduceOp.SUM, shard.axis)
    reduce(target_logit, dist.ReduceOp.SUM, shard.axis)
    loss = (total.log() - target_logit).masked_fill(targets == IGNORE, 0.0)
    return ChunkLogits(
        rows, states, exponentials, total.masked_fill(targets == IGNORE, float("inf")), loss, column, owned, best
    )


def _softmax_in_cache(logits: Tensor, targets: Tensor, rows: slice, states: Tensor) -> ChunkLogits:
    """`_softmax` on a single CPU rank, a few rows at a time, so that their logits stay in the CPU cache."""
    ignored = targets == IGNORE
    column = targets.clamp_min(0)
    loss = torch.empty(logits.shape[0], dtype=logits.dtype)
    for first in range(0, logits.shape[0], _ROWS_IN_CACHE):
        block = slice(first, first + _ROWS_IN_CACHE)
        logarithms = torch.log_softmax(logits[block], dim=1)
        loss[block] = -logarithms.gather(1, column[block, None]).squeeze(1)
        torch.exp(logarithms, out=logits[block])
    total = torch.ones_like(loss).masked_fill_(ignored, float("inf"))
    return ChunkLogits(rows, states, logits, total, loss.masked_fill_(ignored, 0.0), column, ~ignored, None)


def _chunk_gradients(
    part: ChunkLogits,
    weight: Tensor,
    shard: HeadShard,
    scale: Tensor,
    grad: Tensor | None,
    head_gradient: HeadGradient | None,
) -> None:
    """Adds a chunk's contribution to the gradients. A row without a target has total = inf, so its softmax is zero."""
    error = part.exponentials.mul_((scale / part.total)[:, None])
    error.scatter_add_(1, part.column[:, None], (-scale * part.owned.to(error.dtype))[:, None])
    states = part.states
    if upcasts(states):
        weight, states = weight.float(), states.float()
    error = error.to(states.dtype)
    if grad is not None:
        grad_states = (error @ weight).to(grad.dtype)
        if shard.scattered:
            dist.reduce_scatter_tensor(grad[part.rows], grad_states, group=shard.axis.group)
        else:
            grad[part.rows] = grad_states
    if head_gradient is not None:
        head_gradient.add(error, states)
