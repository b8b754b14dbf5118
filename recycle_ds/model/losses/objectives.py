"""What the recycle module is trained for, by row: the loss, and its gradient with respect to the logits.

With p the backbone's distribution of a token and q the module's:

    cross_entropy   -log q(x), x the token of the text                 d/dz = q - onehot(x)
    kl              sum_x p(x) log (p(x) / q(x))                        d/dz = q - p
    acceptance      -log a,  a = sum_x min(p(x), q(x))                  d/dz = q (sum_{q < p} q - [q < p]) / a

a is the probability that a draft sampled from q is accepted by rejection sampling (arXiv 2211.17192, section 3.4); its
negative logarithm is the LK loss of arXiv 2602.23881. p has no gradient. Columns may be split over the tensor axis.

Shapes: n rows, M columns of this rank's head (none on a rank without a token of the draft vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.model.losses.chunks import reduce
from recycle_ds.parallel.mesh import Axis


@dataclass(frozen=True)
class Expected:
    """What a chunk's rows are compared with: the backbone's probabilities [n, M] (None for the text), and the token of the
    text as a column of this rank [n], valid where `owned`."""

    probs: Tensor | None
    column: Tensor
    owned: Tensor


def softmax(logits: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Probabilities over all shards, in place of the logits [n, M], and the logarithm of the sum of exponentials [n].
    Collective."""
    peak = _peak(logits, axis)
    exponentials = logits.sub_(peak[:, None]).exp_()
    total = exponentials.sum(dim=1)
    reduce(total, dist.ReduceOp.SUM, axis)
    return exponentials.div_(total[:, None]), peak + total.log()


def cross_entropy(logits: Tensor, expected: Expected, axis: Axis) -> tuple[Tensor, Tensor]:
    """Loss [n] and gradient [n, M], which takes the logits' memory. A row whose token is on no rank has no meaning."""
    chosen = logits.new_zeros(len(logits))
    column = expected.column[:, None]
    if logits.shape[1]:
        chosen = logits.gather(1, column).squeeze(1).masked_fill(~expected.owned, 0.0)
    reduce(chosen, dist.ReduceOp.SUM, axis)
    probs, logsumexp = softmax(logits, axis)
    if probs.shape[1]:
        probs.scatter_add_(1, column, -expected.owned[:, None].to(probs.dtype))
    return logsumexp - chosen, probs


def kl(logits: Tensor, expected: Expected, axis: Axis) -> tuple[Tensor, Tensor]:
    """Loss [n] and gradient [n, M], which takes the logits' memory."""
    p = expected.probs
    assert p is not None, "the divergence is from the backbone's probabilities"
    peak = _peak(logits, axis)
    total = (logits - peak[:, None]).exp_().sum(dim=1)
    reduce(total, dist.ReduceOp.SUM, axis)
    log_q = logits.sub_((peak + total.log())[:, None])
    # column by column: the sums are far larger than their difference. p log p is 0 where p is 0
    loss = torch.special.xlogy(p, p).sub_(p * log_q).sum(dim=1)
    reduce(loss, dist.ReduceOp.SUM, axis)
    return loss, log_q.exp_().sub_(p)


def acceptance(logits: Tensor, expected: Expected, axis: Axis) -> tuple[Tensor, Tensor]:
    """Loss [n] and gradient [n, M], which takes the logits' memory."""
    p = expected.probs
    assert p is not None, "drafts are accepted by the backbone's probabilities"
    q, _ = softmax(logits, axis)
    below = q < p
    sums = torch.stack((torch.minimum(p, q).sum(dim=1), (q * below).sum(dim=1)))
    reduce(sums, dist.ReduceOp.SUM, axis)
    accepted, low = sums
    accepted = accepted.clamp_min(torch.finfo(q.dtype).tiny)
    return -accepted.log(), q.mul_((low[:, None] - below.to(q.dtype)).div_(accepted[:, None]))


def _peak(logits: Tensor, axis: Axis) -> Tensor:
    """The highest logit of each row over all shards [n]."""
    peak = logits.amax(dim=1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
    reduce(peak, dist.ReduceOp.MAX, axis)
    return peak


OBJECTIVES = {"cross_entropy": cross_entropy, "kl": kl, "acceptance": acceptance}
