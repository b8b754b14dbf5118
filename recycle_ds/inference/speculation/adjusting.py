"""What requests change of the logits before a token is chosen: penalties, bias, forbidden tokens.

Shapes: R rows, V token ids of this rank's shard, N tokens that a request names, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation.vocabulary import Vocabulary

_MOST_KEPT = 2**26
"""Numbers of the tensors that are kept: each request may have as many as the vocabulary."""


@dataclass(frozen=True)
class Position:
    """A position whose token is to be chosen."""

    params: TokenSampling
    seed: int
    """Seed of the sequence's random numbers."""
    index: int
    """Position in the sequence; the prompt starts at 0."""
    new_tokens: int
    """New tokens before this position, drafts included."""
    end_ids: tuple[int, ...] = ()
    """Tokens that `min_new_tokens` forbids until then."""
    history: Callable[[], Tensor] | None = None
    """Returns the ids of all tokens before this position [index], drafts included. Needed for penalties."""


@dataclass(frozen=True)
class Amendments:
    """What a request's parameters add to single logits of a shard, as tensors: its lists may have thousands of tokens, and
    every row of every step needs them."""

    biased: Tensor
    bias: Tensor
    """Places in the shard of biased tokens, and what is added [N] each."""
    barred_V: Tensor | None
    """Which tokens are never chosen; None if none is."""

    @property
    def size(self) -> int:
        """Numbers in all tensors, and one for the request."""
        return 1 + 2 * len(self.biased) + (0 if self.barred_V is None else len(self.barred_V))

    @staticmethod
    def of(params: TokenSampling, vocabulary: Vocabulary, device: torch.device) -> Amendments:
        """Those of a request."""

        def own(ids: Sequence[int]) -> Tensor:
            index, is_own = vocabulary.local(torch.tensor(ids, dtype=torch.int64, device=device))
            return index[is_own]

        ids, values = [token for token, _ in params.logit_bias], [value for _, value in params.logit_bias]
        biased, is_own = vocabulary.local(torch.tensor(ids, dtype=torch.int64, device=device))
        bias = torch.where(is_own, torch.tensor(values, dtype=torch.float32, device=device), 0.0)
        barred_V = None
        if params.allowed_tokens is not None or params.bad_tokens:
            barred_V = torch.full((vocabulary.count,), params.allowed_tokens is not None, device=device)
            barred_V[own(params.allowed_tokens or ())] = False
            barred_V[own(params.bad_tokens)] = True
        return Amendments(biased, bias, barred_V)


class Adjuster:
    """Applies penalties, bias and forbidden tokens to logits of a shard. It keeps the tensors of the latest requests."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._known: dict[int, tuple[TokenSampling, Amendments]] = {}
        self._kept = 0

    def adjust(self, logits_RV: Tensor, positions: Sequence[Position]) -> Tensor:
        """Returns the same tensor if no position has any, else a new one."""
        if not any(position.params.adjusts for position in positions):
            return logits_RV
        logits_RV = logits_RV.clone()
        for row_V, position in zip(logits_RV, positions, strict=True):
            if position.params.adjusts:
                self._adjust(row_V, position)
        return logits_RV

    def _amendments(self, params: TokenSampling, device: torch.device) -> Amendments:
        # by identity: comparing thousands of tokens would take longer than what is saved
        _, found = self._known.get(id(params), (params, None))
        if found is None:
            found = Amendments.of(params, self._vocabulary, device)
            self._known[id(params)] = params, found
            self._kept += found.size
            while self._kept > _MOST_KEPT:
                _, oldest = self._known.pop(next(iter(self._known)))
                self._kept -= oldest.size
        return found

    def _adjust(self, row_V: Tensor, position: Position) -> None:
        """Changes one row."""
        params, vocabulary = position.params, self._vocabulary

        def own(ids: Tensor) -> Tensor:
            """Indices of those ids that are on this shard."""
            index, is_own = vocabulary.local(ids)
            return index[is_own]

        if params.penalises:
            assert position.history is not None, "penalties need the tokens so far"
            history = position.history()
            if params.repetition_penalty != 1:
                row_V.copy_(penalise(row_V, params.repetition_penalty, own(history)))
            output = own(history[len(history) - position.new_tokens :])
            times_V = torch.bincount(output, minlength=vocabulary.count)
            row_V -= params.frequency_penalty * times_V + params.presence_penalty * (times_V > 0)
        if params.logit_bias or params.bad_tokens or params.allowed_tokens is not None:
            amendments = self._amendments(params, row_V.device)
            row_V.index_add_(0, amendments.biased, amendments.bias)
            if amendments.barred_V is not None:
                row_V.masked_fill_(amendments.barred_V, -math.inf)
        if position.end_ids and position.new_tokens < params.min_new_tokens:
            row_V[own(torch.tensor(position.end_ids, device=row_V.device))] = -math.inf


def penalise(logits_V: Tensor, penalty: float, history_L: Tensor) -> Tensor:
    """Divides the logits of tokens in history_L (int64, repeats allowed) by the penalty; multiplies negative ones."""
    seen_L = logits_V.gather(-1, history_L)
    return logits_V.scatter(-1, history_L, torch.where(seen_L < 0, seen_L * penalty, seen_L / penalty))
