"""Choice of tokens where all parameters are tensors: the same tokens as by speculation/sampling.py, without waiting for the
device. Shapes: R rows, V token ids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.inference.speculation import noise


@dataclass(frozen=True)
class Rows:
    """How the token of every row is chosen: the fields of `TokenSampling`, [R] each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor
    """See `noise.key`."""
    limited: bool
    """Whether any row has a limit: top-k, top-p or min-p. Sorting the vocabulary is left out otherwise."""


def likeliest(logits_RV: Tensor, ids_V: Tensor) -> Tensor:
    """The id of the highest logit of each row [R]; among equal ones the lowest."""
    return ids_V[logits_RV.max(-1).indices]


def choose(logits_RV: Tensor, ids_V: Tensor, rows: Rows) -> Tensor:
    """The token of every row [R], int64, from adjusted logits."""
    greedy_R = rows.temperature == 0
    likeliest_R = likeliest(logits_RV, ids_V)
    scaled_RV = logits_RV / torch.where(greedy_R, 1.0, rows.temperature)[:, None]
    weights_RV = _limited(scaled_RV, rows) if rows.limited else scaled_RV.softmax(-1)
    sampled_R = likeliest(weights_RV / noise.exponentials(rows.keys, ids_V), ids_V)
    return torch.where(greedy_R, likeliest_R, sampled_R)


def _limited(logits_RV: Tensor, rows: Rows) -> Tensor:
    """Probabilities, not normalised, with 0 for tokens beyond the limits."""
    count = logits_RV.shape[1]
    best_RV = logits_RV.sort(dim=-1, descending=True).values
    limited_R1 = ((rows.top_k > 0) & (rows.top_k < count))[:, None]
    lowest_R1 = best_RV.gather(-1, (rows.top_k - 1).clamp(0, count - 1)[:, None])
    probs_RV = logits_RV.masked_fill(limited_R1 & (logits_RV < lowest_R1), -math.inf).softmax(-1)
    best_RV = probs_RV.sort(dim=-1, descending=True).values
    reached_RV = best_RV.cumsum(-1) >= rows.top_p[:, None]
    limit_R1 = best_RV.gather(-1, reached_RV.int().argmax(-1, keepdim=True))
    bounded_R1 = reached_RV.any(-1, keepdim=True) & (rows.top_p < 1)[:, None]  # not reached: by rounding
    probs_RV = torch.where(bounded_R1 & (probs_RV < limit_R1), 0.0, probs_RV)
    return torch.where(probs_RV < rows.min_p[:, None] * probs_RV.amax(-1, keepdim=True), 0.0, probs_RV)
