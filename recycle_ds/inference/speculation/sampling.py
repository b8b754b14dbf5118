"""Token selection: from logits to a distribution to a token, for many positions at once, each with its own parameters.

The parameters have the same meaning and order as in Hugging Face transformers: repetition penalty (Keskar et al., arXiv
1909.05858), temperature, top-k, top-p (Holtzman et al., arXiv 1904.09751), min-p (Nguyen et al., arXiv 2407.01082);
presence and frequency penalties and the bias are those of OpenAI's API. Tokens are chosen with counter-based random
numbers (see noise.py), from any shard of the vocabulary. Shapes: R positions, V token ids of this rank's shard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.adjusting import Position
from recycle_ds.inference.speculation.vocabulary import Vocabulary

# Candidates among which the limit of top-p is looked for first.
_CANDIDATES = 256


def probabilities(logits_RV: Tensor, params: Sequence[TokenSampling], vocabulary: Vocabulary) -> Tensor:
    """The distributions that tokens are sampled from [R, V], from adjusted logits; at temperature 0, 1 on the chosen
    token."""
    if all(one.greedy for one in params):
        chosen_R = vocabulary.argmax(logits_RV)
        return (vocabulary.ids(logits_RV.device) == chosen_R[:, None]).float()

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits_RV.device, dtype=torch.float32)[:, None]

    # the limits see nearly greedy rows for temperature 0; these rows are replaced at the end
    logits_RV = logits_RV / column([1.0 if one.greedy else one.temperature for one in params])
    size = int(vocabulary.sum(torch.tensor(vocabulary.count, device=logits_RV.device)))
    top_k = [one.top_k if 0 < one.top_k < size else 0 for one in params]
    if any(top_k):
        best_RN = vocabulary.largest(logits_RV, max(top_k))
        index_R1 = torch.tensor([max(k - 1, 0) for k in top_k], device=logits_RV.device)[:, None]
        lowest_R1 = best_RN.gather(-1, index_R1)
        limited_R1 = torch.tensor([k > 0 for k in top_k], device=logits_RV.device)[:, None]
        logits_RV = logits_RV.masked_fill(limited_R1 & (logits_RV < lowest_R1), -math.inf)
    probs_RV = vocabulary.softmax(logits_RV)
    if any(one.top_p < 1 for one in params):
        limit_R1 = _nucleus_limit(probs_RV, column([one.top_p for one in params]), vocabulary)
        probs_RV = torch.where(probs_RV < limit_R1, 0.0, probs_RV)
    if any(one.min_p > 0 for one in params):
        highest_R1 = vocabulary.max(probs_RV.amax(-1))[:, None]
        probs_RV = torch.where(probs_RV < column([one.min_p for one in params]) * highest_R1, 0.0, probs_RV)
    probs_RV = probs_RV / vocabulary.sum(probs_RV.sum(-1))[:, None]
    if any(one.greedy for one in params):
        greedy_R1 = torch.tensor([one.greedy for one in params], device=logits_RV.device)[:, None]
        one_hot_RV = (vocabulary.ids(logits_RV.device) == vocabulary.argmax(logits_RV)[:, None]).float()
        probs_RV = torch.where(greedy_R1, one_hot_RV, probs_RV)
    return probs_RV


def pick(weights_RV: Tensor, keys: Sequence[int], vocabulary: Vocabulary) -> Tensor:
    """Samples one id from each row of (not necessarily normalised) weights, int64 [R]. keys: see `noise.key`."""
    keys_R = torch.tensor(keys, device=weights_RV.device)
    return vocabulary.argmax(weights_RV / noise.exponentials(keys_R, vocabulary.ids(weights_RV.device)))


def choose(
    logits_RV: Tensor, positions: Sequence[Position], vocabulary: Vocabulary, purpose: int = noise.TOKEN
) -> tuple[Tensor, Tensor | None]:
    """Chooses a token for every position from adjusted logits. Returns the ids [R], and the distributions [R, V] if any
    position samples. No row depends on the others."""
    if all(position.params.greedy for position in positions):
        return vocabulary.argmax(logits_RV), None
    probs_RV = probabilities(logits_RV, [position.params for position in positions], vocabulary)
    keys = [noise.key(position.seed, position.index, purpose) for position in positions]
    return pick(probs_RV, keys, vocabulary), probs_RV


def _nucleus_limit(probs_RV: Tensor, top_p_R1: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The largest probability [R, 1] such that all tokens of at least this probability reach top_p together.

    It is mostly found among the few most likely tokens, without sorting the vocabulary. Otherwise it is found by
    bisection over the bit patterns of the (positive) fp32 numbers, which are ordered like the numbers.
    """
    best_RN = vocabulary.largest(probs_RV, _CANDIDATES)
    reached_RN = best_RN.cumsum(-1) >= top_p_R1
    limit_R1 = best_RN.gather(-1, reached_RN.int().argmax(-1, keepdim=True))
    limit_R1 = torch.where(top_p_R1 < 1, limit_R1, 0.0)
    if bool((reached_RN.any(-1, keepdim=True) | (top_p_R1 >= 1)).all()):
        return limit_R1
    low_R1 = torch.zeros_like(limit_R1, dtype=torch.int64)
    high_R1 = torch.full_like(low_R1, torch.tensor(2.0).view(torch.int32).item())
    while bool((high_R1 - low_R1 > 1).any()):
        middle_R1 = (low_R1 + high_R1) // 2
        kept_RV = probs_RV >= middle_R1.int().view(torch.float32)
        enough_R1 = vocabulary.sum(torch.where(kept_RV, probs_RV, 0.0).sum(-1))[:, None] >= top_p_R1
        low_R1 = torch.where(enough_R1, middle_R1, low_R1)
        high_R1 = torch.where(enough_R1, high_R1, middle_R1)
    bisected_R1 = low_R1.int().view(torch.float32)
    return torch.where(reached_RN.any(-1, keepdim=True) | (top_p_R1 >= 1), limit_R1, bisected_R1)
