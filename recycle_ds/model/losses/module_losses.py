"""The recycle module's losses under any objective and draft vocabulary, in chunks of rows.

r^k_t and h_{t+k} predict the same token. Chunks therefore run over the backbone's rows: its logits for a chunk are computed
once and serve all K depths, each with the rows that are k positions earlier. Gradients are formed in the forward pass, as in
`cross_entropy`, so the logits of a chunk are freed before those of the next.

With a draft vocabulary the module's head has only that vocabulary's rows. Then

    cross_entropy   counts the targets that are in it, as given by `counted`
    kl              is from the backbone's probabilities over it, which are scaled to sum to 1
    acceptance      takes the backbone's probabilities as they are: tokens outside it are never drafted, so a is below 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.data.targets import IGNORE
from recycle_ds.model.losses.chunks import HeadGradient, HeadShard, global_argmax, reduce
from recycle_ds.model.losses.fused import FusedLosses
from recycle_ds.model.losses.objectives import OBJECTIVES, Expected, softmax
from recycle_ds.parallel.products import upcasts


@dataclass(frozen=True)
class ModuleHead:
    """How the module's states are judged.

    columns: the rows of this rank's head that are in the draft vocabulary, ascending; None for all. chunk: rows of logits in
    memory at once. train_head: whether the losses contribute to the head's gradient. compare_choices: whether to compare the
    likeliest tokens of module and backbone. fused: compiled functions. shard: must not be scattered.
    """

    objective: str
    shard: HeadShard
    columns: Tensor | None
    chunk: int
    train_head: bool
    compare_choices: bool = False
    fused: FusedLosses | None = None


def module_losses(
    teacher: Tensor | None,
    states: Sequence[Tensor],
    weight: Tensor,
    targets: Tensor,
    counted: Tensor,
    scales: Tensor,
    head: ModuleHead,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the module's states.

    teacher: [N + K B, D], the backbone's states of B sequences: this rank's N rows, position by position, and those of the K
    positions after them (anything where there are none). None if nothing is compared with the backbone. states: K tensors
    [N, D]. weight: [V_local, D]. targets: [K+1, N], the backbone's first, IGNORE for rows without a target. counted: bool
    [K, N], the rows that count. scales: [K+1], the weight of one row's loss in the total; the first is not used.

    Returns the weighted total of the module's losses (scalar, differentiable) and the unweighted sums over rows [K+1] without a
    gradient, fp32 (fp64 for fp64 states). The first is the backbone's cross entropy, 0 without a teacher. Last, bool [K, N]:
    where the module's likeliest token is the backbone's, if `head.compare_choices`. Collective over the tensor axis.
    """
    assert not head.shard.scattered, "the rows of a position must be on one rank"
    assert teacher is not None or head.objective == "cross_entropy", f"{head.objective} compares with the backbone"
    assert teacher is not None or not head.compare_choices, "choices are compared with the backbone's"
    total, sums, agrees = _ModuleLosses.apply(weight, teacher, targets, counted, scales, head, *states)
    return total, sums, agrees


class _ModuleLosses(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        counted: Tensor,
        scales: Tensor,
        head: ModuleHead,
        *states: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        want_weight = ctx.needs_input_grad[0] and head.train_head
        run = _Run(weight, targets, counted, scales, head, states, want_weight, ctx.needs_input_grad[6:])
        rows = states[0].shape[0]
        stride = 0 if teacher is None else (len(teacher) - rows) // len(states)
        reach = rows + len(states) * stride
        for start in range(0, reach, head.chunk):
            part = slice(start, min(start + head.chunk, reach))
            probs, best = (None, None) if teacher is None else run.backbone(teacher[part], part)
            for depth in range(1, len(states) + 1):
                first, end = max(part.start - depth * stride, 0), min(part.stop - depth * stride, rows)
                if first < end:
                    own = slice(first + depth * stride - part.start, end + depth * stride - part.start)
                    chosen = (None if tensor is None else tensor[own] for tensor in (probs, best))
                    run.module(depth, slice(first, end), *chosen)
        axis = head.shard.axis
        for grad in run.grads:
            if grad is not None and axis.size > 1:
                dist.all_reduce(grad, group=axis.group)
        ctx.save_for_backward(run.head_gradient() if want_weight else None, *run.grads)
        ctx.mark_non_differentiable(run.sums, run.agrees)
        return torch.dot(run.sums[1:], scales[1:].to(run.sums.dtype)), run.sums, run.agrees

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_weight, *grads = ctx.saved_tensors
        scaled = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in (grad_weight, *grads)]
        return (scaled[0], None, None, None, None, None, *scaled[1:])


class _Run:
    """One forward pass: sums and gradients so far."""

    def __init__(
        self,
        weight: Tensor,
        targets: Tensor,
        counted: Tensor,
        scales: Tensor,
        head: ModuleHead,
        states: Sequence[Tensor],
        want_weight: bool,
        want_states: Sequence[bool],
    ) -> None:
        self._head, self._states = head, states
        self._targets, self._counted, self._scales = targets, counted, scales
        self._full = weight[: head.shard.valid]
        self._rows = self._full if head.columns is None else self._full[head.columns]
        self._weight = weight
        self._gradient = HeadGradient(self._rows) if want_weight else None
        self.grads = [torch.empty_like(s) if wanted else None for s, wanted in zip(states, want_states, strict=True)]
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.sums = torch.zeros(1 + len(states), dtype=kind, device=weight.device)
        self.agrees = torch.zeros_like(counted)

    def backbone(self, hidden: Tensor, part: slice) -> tuple[Tensor | None, Tensor | None]:
        """Adds the backbone's cross entropy of a chunk's rows. Returns its probabilities of the head's tokens [n, M], if the
        objective needs them, and its likeliest tokens [n], if they are compared."""
        axis, rows = self._head.shard.axis, self._targets.shape[1]
        logits = _logits(hidden, self._full)
        best = self._best(logits, None) if self._head.compare_choices else None
        compares = self._head.objective != "cross_entropy"
        columns = self._head.columns
        chosen = None
        if compares and columns is not None:
            chosen = logits[:, columns]
        own = slice(part.start, min(part.stop, rows))
        count = max(own.stop - own.start, 0)
        token = torch.full((len(hidden),), IGNORE, device=hidden.device)
        token[:count] = self._targets[0, own]
        column, owned = self._column(token, None)
        target_logit = logits.new_zeros(len(logits))
        if logits.shape[1]:
            target_logit = logits.gather(1, column[:, None]).squeeze(1).masked_fill(~owned, 0.0)
        reduce(target_logit, dist.ReduceOp.SUM, axis)
        probs, logsumexp = softmax(logits, axis)
        self.sums[0] += (logsumexp - target_logit).masked_fill(token == IGNORE, 0.0).sum()
        if not compares:
            return None, best
        if chosen is None:
            return probs, best
        if self._head.objective == "kl":
            return softmax(chosen, axis)[0], best
        return chosen.sub_(logsumexp[:, None]).exp_(), best

    def module(self, depth: int, rows: slice, probs: Tensor | None, best: Tensor | None) -> None:
        """Adds the loss of the module's rows at a depth, and their gradients. probs, best: of the backbone."""
        states, scale = self._states[depth - 1][rows], self._scales[depth]
        counted = self._counted[depth - 1, rows]
        grad = self.grads[depth - 1]
        trains = grad is not None or self._gradient is not None
        fused = self._head.fused if trains and self._head.shard.axis.size == 1 and not upcasts(states) else None
        logits = _logits(states, self._rows) if fused is None else F.linear(states, self._rows)
        if best is not None:
            self.agrees[depth - 1, rows] = self._best(logits, self._head.columns) == best
        weights = scale * counted
        if fused is not None:
            loss, error = self._fused(fused, logits, depth, rows, probs, weights)
            self.sums[depth] += loss.masked_fill(~counted, 0.0).sum()
            self._add(error, states, grad, rows)
            return
        column, owned = self._column(self._targets[depth, rows], self._head.columns)
        loss, error = OBJECTIVES[self._head.objective](logits, Expected(probs, column, owned), self._head.shard.axis)
        self.sums[depth] += loss.masked_fill(~counted, 0.0).sum()
        if trains:
            self._add(error.mul_(weights[:, None]), states, grad, rows)

    def _fused(
        self, fused: FusedLosses, logits: Tensor, depth: int, rows: slice, probs: Tensor | None, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss [n] and weighted gradient [n, M] of a chunk by the compiled functions."""
        if probs is not None:
            return fused.compare(self._head.objective, logits, probs, weights)
        column, owned = self._column(self._targets[depth, rows], self._head.columns)
        return fused.cross_entropy(logits, column.masked_fill(~owned, IGNORE), weights, logits.shape[1])

    def _add(self, error: Tensor, states: Tensor, grad: Tensor | None, rows: slice) -> None:
        """Adds a chunk's contribution to the gradients. error: [n, M], with respect to the logits."""
        weight = self._rows
        if upcasts(states):
            weight, states = weight.float(), states.float()
        error = error.to(states.dtype)
        if grad is not None:
            grad[rows] = (error @ weight).to(grad.dtype)
        if self._gradient is not None:
            self._gradient.add(error, states)

    def head_gradient(self) -> Tensor:
        """[V_local, D], zero for padding and outside the draft vocabulary."""
        assert self._gradient is not None
        total, columns = self._gradient.total(), self._head.columns
        found = torch.zeros_like(self._weight)
        if columns is None:
            found[: len(total)] = total
        else:
            found[columns] = total
        return found

    def _best(self, logits: Tensor, columns: Tensor | None) -> Tensor:
        """The likeliest token of each row [n], over all shards; the lowest of equally likely ones."""
        if logits.shape[1]:
            peak, index = logits.max(dim=1)
            index = index if columns is None else columns[index]
        else:
            peak = logits.new_full((len(logits),), -torch.inf)
            index = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return global_argmax(peak, index + self._head.shard.first, self._head.shard.axis)

    def _column(self, tokens: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where tokens are in this rank's head, or in some of its rows: columns, and whether they are there at all."""
        local = tokens - self._head.shard.first
        if columns is None:
            return local.clamp(0, max(self._head.shard.valid - 1, 0)), (local >= 0) & (local < self._head.shard.valid)
        if not len(columns):
            return torch.zeros_like(local), torch.zeros_like(local, dtype=torch.bool)
        column = torch.searchsorted(columns, local).clamp_max(len(columns) - 1)
        return column, columns[column] == local


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    """[n, D] by [M, D] to [n, M], in fp32 or fp64."""
    if upcasts(states):
        return F.linear(states.float(), weight.float())
    logits = F.linear(states, weight)
    return logits if logits.dtype == torch.float64 else logits.float()
