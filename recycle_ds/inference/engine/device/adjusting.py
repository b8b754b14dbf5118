"""Penalties, bias and forbidden tokens where all parameters are tensors: the same logits as by `adjust` in
speculation/adjusting.py. Shapes: R rows, N sequences, L positions, J drafts before a row at most, V token ids."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recycle_ds.inference.engine.plan import Rules
from recycle_ds.inference.speculation.vocabulary import Vocabulary


@dataclass(frozen=True)
class Penalties:
    """Parameters and number of new tokens of every row, [R] each; int64 or fp32."""

    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    ends_from: Tensor
    """`min_new_tokens`."""
    new_tokens: Tensor
    """Before the row, drafts included."""
    places: Tensor
    """Row of each in `Amended`."""

    def at(self, rows: Tensor) -> Penalties:
        """Those of some rows."""
        return Penalties(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class Amended:
    """What requests add to single logits: a bias, and tokens that are never or not yet chosen. Written once for each request;
    place 0 is that of requests without any."""

    def __init__(self, places: int, vocabulary: Vocabulary, device: torch.device) -> None:
        self._vocabulary, self._device, self._shape = vocabulary, device, (places + 1, vocabulary.count)
        self._places: dict[int, int] = {}
        self._free = list(range(places, 0, -1))
        none = torch.zeros((0, vocabulary.count), device=device)
        self.bias, self.barred, self.barred_early = none, none.bool(), none.bool()

    def place(self, number: int, rules: Rules) -> int | None:
        """The place of a sequence, which is written if it has none; 0 if it amends nothing; None if all are taken."""
        params = rules.params
        if not params.adjusts:
            return 0
        if not len(self.bias):  # only now: some 20 MB for a vocabulary of 50,000 tokens
            self.bias = torch.zeros(self._shape, device=self._device)
            self.barred, self.barred_early = self.bias.bool(), self.bias.bool()
        if not (params.logit_bias or params.bad_tokens or params.min_new_tokens or params.allowed_tokens is not None):
            return 0
        if number in self._places:
            return self._places[number]
        if not self._free:
            return None
        place = self._places[number] = self._free.pop()
        self.bias[place].zero_().index_add_(0, *self._own_values(params.logit_bias))
        self.barred[place].fill_(params.allowed_tokens is not None)
        for ids, row, value in (
            (params.allowed_tokens or (), self.barred[place], False),
            (params.bad_tokens, self.barred[place], True),
            (rules.end_ids, self.barred_early[place].zero_(), True),
        ):
            index, own = self._local(ids)
            row[index[own]] = value
        return place

    def forget(self, numbers: Iterable[int]) -> None:
        """Frees the places of sequences that have ended."""
        for number in numbers:
            if number in self._places:
                self._free.append(self._places.pop(number))

    def _local(self, ids: Iterable[int]) -> tuple[Tensor, Tensor]:
        return self._vocabulary.local(torch.tensor(list(ids), dtype=torch.int64, device=self._device))

    def _own_values(self, bias: Iterable[tuple[int, float]]) -> tuple[Tensor, Tensor]:
        pairs = list(bias)
        index, own = self._local(token for token, _ in pairs)
        values = torch.tensor([value for _, value in pairs], dtype=torch.float32, device=self._device)
        return index, torch.where(own, values, 0.0)


@dataclass(frozen=True)
class Counts:
    """How often every token occurs before a row: in all of the text, and in its new part, fp32 [R, V]."""

    seen: Tensor
    new: Tensor

    def at(self, rows: Tensor) -> Counts:
        """Those of some rows."""
        return Counts(self.seen[rows], self.new[rows])

    def plus(self, drafts_RJ: Tensor, used_RJ: Tensor, vocabulary: Vocabulary) -> Counts:
        """With drafts before each row, which are new tokens. used_RJ: which of them count."""
        index_RJ, own_RJ = vocabulary.local(drafts_RJ)
        ones_RJ = (own_RJ & used_RJ).float()
        return Counts(self.seen.scatter_add(1, index_RJ, ones_RJ), self.new.scatter_add(1, index_RJ, ones_RJ))


def counted(tokens_NL: Tensor, starts_N: Tensor, ends_N: Tensor, vocabulary: Vocabulary) -> Counts:
    """Counts the tokens at the positions before ends_N; those from starts_N on are new. Others may hold anything."""
    at_L = torch.arange(tokens_NL.shape[1], device=tokens_NL.device)
    known_NL = at_L < ends_N[:, None]
    index_NL, own_NL = vocabulary.local(torch.where(known_NL, tokens_NL, 0))
    known_NL = known_NL & own_NL
    none = torch.zeros((len(tokens_NL), vocabulary.count), device=tokens_NL.device)
    seen = none.scatter_add(1, index_NL, known_NL.float())
    return Counts(seen, none.scatter_add(1, index_NL, (known_NL & (at_L >= starts_N[:, None])).float()))


def adjust(logits_RV: Tensor, penalties: Penalties, counts: Counts, amended: Amended) -> Tensor:
    """Applies everything that changes logits before the temperature [R, V]."""
    repetition_R1 = penalties.repetition[:, None]
    penalised_RV = torch.where(logits_RV < 0, logits_RV * repetition_R1, logits_RV / repetition_R1)
    logits_RV = torch.where(counts.seen > 0, penalised_RV, logits_RV)
    less_RV = penalties.frequency[:, None] * counts.new + penalties.presence[:, None] * (counts.new > 0)
    logits_RV = logits_RV - less_RV + amended.bias[penalties.places]
    early_R1 = (penalties.new_tokens < penalties.ends_from)[:, None]
    barred_RV = amended.barred[penalties.places] | (amended.barred_early[penalties.places] & early_R1)
    return logits_RV.masked_fill(barred_RV, -math.inf)


def later(penalties: Penalties, tokens: Tensor | int) -> Penalties:
    """The same after some more new tokens."""
    return replace(penalties, new_tokens=penalties.new_tokens + tokens)
