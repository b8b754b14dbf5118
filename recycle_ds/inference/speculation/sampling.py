"""From logits to a distribution to a token.

The knobs mean what they mean in Hugging Face transformers, and act in its order: repetition penalty (Keskar et al.,
arXiv 1909.05858), temperature, top-k, top-p (Holtzman et al., arXiv 1904.09751), min-p (Nguyen et al., arXiv
2407.01082).
Shapes: V vocabulary, L length of the history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.inference.errors import DecodingError

# Below this, logits divided by the temperature may leave the range of fp32.
MIN_TEMPERATURE = 1e-4
_SEED_LIMIT = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy decoding.

    temperature: 0 takes the most likely token; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
    repetition_penalty: divides positive logits (multiplies negative ones) of tokens in prompt and output; 1 changes
    nothing.
    seed: makes sampling repeatable; None draws a new one every time.

    Raises DecodingError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or 0 != self.temperature < MIN_TEMPERATURE:
            raise DecodingError(
                f"temperature={self.temperature}: must be 0 (greedy) or a finite number of at least {MIN_TEMPERATURE:g}"
            )
        if self.top_k < 0:
            raise DecodingError(f"top_k={self.top_k}: must be 0 (keep all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise DecodingError(f"top_p={self.top_p}: must be above 0 and at most 1 (keep all tokens)")
        if not 0 <= self.min_p <= 1:
            raise DecodingError(f"min_p={self.min_p}: must be from 0 (keep all tokens) to 1")
        if not math.isfinite(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise DecodingError(
                f"repetition_penalty={self.repetition_penalty}: must be a finite number above 0; 1 changes nothing"
            )
        if self.seed is not None and not 0 <= self.seed < _SEED_LIMIT:
            raise DecodingError(f"seed={self.seed}: must be from 0 to 2^63 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1


def penalise(logits_V: Tensor, penalty: float, history_L: Tensor) -> Tensor:
    """Logits, those of tokens in history_L (int64, repeats allowed) divided by the penalty, multiplied if negative."""
    seen_L = logits_V.gather(-1, history_L)
    return logits_V.scatter(-1, history_L, torch.where(seen_L < 0, seen_L * penalty, seen_L / penalty))


def most_likely(logits_V: Tensor, params: SamplingParams, history_L: Tensor) -> Tensor:
    """The greedy choice: argmax after the penalty, a scalar int64 tensor on the logits' device (no sort, no sync)."""
    if params.penalises:
        logits_V = penalise(logits_V, params.repetition_penalty, history_L)
    return logits_V.argmax(-1)


def distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities of (already penalised) logits: temperature, top-k, top-p, min-p, each leading row by itself."""
    if params.greedy:
        return torch.zeros_like(logits_V).scatter_(-1, logits_V.argmax(-1, keepdim=True), 1.0)
    logits_V = logits_V / params.temperature
    vocabulary = logits_V.shape[-1]
    if 0 < params.top_k < vocabulary:
        lowest_1 = logits_V.topk(params.top_k, dim=-1).values[..., -1:]
        logits_V = logits_V.masked_fill(logits_V < lowest_1, -math.inf)
    if params.top_p < 1:
        ascending_V, order_V = logits_V.sort(dim=-1)
        # A token goes if it and all less likely ones together weigh at most 1 - top_p; the most likely one always
        # stays.
        dropped_V = ascending_V.softmax(-1).cumsum(-1) <= 1 - params.top_p
        dropped_V[..., -1] = False
        logits_V = logits_V.masked_fill(dropped_V.scatter(-1, order_V, dropped_V), -math.inf)
    probs_V = logits_V.softmax(-1)
    if params.min_p > 0:
        kept_V = probs_V >= params.min_p * probs_V.amax(-1, keepdim=True)
        probs_V = logits_V.masked_fill(~kept_V, -math.inf).softmax(-1)
    return probs_V


def probabilities(logits_V: Tensor, params: SamplingParams, history_L: Tensor) -> Tensor:
    """The distribution the next token is drawn from.

    logits_V: fp32 logits of one position. history_L: int64 ids of the prompt and of all tokens before this position.
    Returns fp32 probabilities that sum to 1; at temperature 0, 1 on the most likely token.
    """
    if params.penalises:
        logits_V = penalise(logits_V, params.repetition_penalty, history_L)
    return distribution(logits_V, params)


def sample(probs_V: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws one token id, a scalar int64 tensor on the device of probs_V, where the generator lives too."""
    return torch.multinomial(probs_V, 1, generator=generator)[0]
