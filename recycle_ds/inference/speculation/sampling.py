"""Token selection: from logits to a distribution to a token.

The parameters have the same meaning and order as in Hugging Face transformers: repetition penalty (Keskar et al.,
arXiv 1909.05858), temperature, top-k, top-p (Holtzman et al., arXiv 1904.09751), min-p (Nguyen et al., arXiv
2407.01082).
Shapes: V vocabulary, L length of the history.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recycle_ds.inference.parameters import TokenSampling


def penalise(logits_V: Tensor, penalty: float, history_L: Tensor) -> Tensor:
    """Divides the logits of tokens in history_L (int64, repeats allowed) by the penalty; multiplies negative ones."""
    seen_L = logits_V.gather(-1, history_L)
    return logits_V.scatter(-1, history_L, torch.where(seen_L < 0, seen_L * penalty, seen_L / penalty))


def most_likely(logits_V: Tensor, params: TokenSampling, history_L: Tensor) -> Tensor:
    """Greedy selection: argmax after the penalty, a scalar int64 tensor on the logits' device (no sort, no sync)."""
    if params.penalises:
        logits_V = penalise(logits_V, params.repetition_penalty, history_L)
    return logits_V.argmax(-1)


def distribution(logits_V: Tensor, params: TokenSampling) -> Tensor:
    """Probabilities of (already penalised) logits: temperature, top-k, top-p, min-p, for each leading row separately."""
    if params.greedy:
        return torch.zeros_like(logits_V).scatter_(-1, logits_V.argmax(-1, keepdim=True), 1.0)
    logits_V = logits_V / params.temperature
    vocabulary = logits_V.shape[-1]
    if 0 < params.top_k < vocabulary:
        lowest_1 = logits_V.topk(params.top_k, dim=-1).values[..., -1:]
        logits_V = logits_V.masked_fill(logits_V < lowest_1, -math.inf)
    if params.top_p < 1:
        ascending_V, order_V = logits_V.sort(dim=-1)
        # A token is dropped if it and all less likely ones have a total probability of at most 1 - top_p. The most
        # likely one is always kept.
        dropped_V = ascending_V.softmax(-1).cumsum(-1) <= 1 - params.top_p
        dropped_V[..., -1] = False
        logits_V = logits_V.masked_fill(dropped_V.scatter(-1, order_V, dropped_V), -math.inf)
    probs_V = logits_V.softmax(-1)
    if params.min_p > 0:
        kept_V = probs_V >= params.min_p * probs_V.amax(-1, keepdim=True)
        probs_V = logits_V.masked_fill(~kept_V, -math.inf).softmax(-1)
    return probs_V


def probabilities(logits_V: Tensor, params: TokenSampling, history_L: Tensor) -> Tensor:
    """The distribution that the next token is sampled from.

    logits_V: fp32 logits of one position. history_L: int64 ids of the prompt and of all tokens before this position.
    Returns fp32 probabilities that sum to 1; at temperature 0, 1 on the most likely token.
    """
    if params.penalises:
        logits_V = penalise(logits_V, params.repetition_penalty, history_L)
    return distribution(logits_V, params)


def sample(probs_V: Tensor, generator: torch.Generator | None) -> Tensor:
    """Samples one token id, a scalar int64 tensor on the device of probs_V. The generator must be on that device."""
    return torch.multinomial(probs_V, 1, generator=generator)[0]
