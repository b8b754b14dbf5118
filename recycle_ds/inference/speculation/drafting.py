"""The recycle chain: drafts the next tokens from the states the backbone has just computed.

Offsets (0-based positions, N tokens known, so x_{N-1} is the last). The backbone has read x_0..x_{N-2}; entry p of the
module is made of (h_p, E x_{p+1}) and predicts x_{p+2}:

    true entries   ..N-2          one batched call over those not read yet; the last one's r^1 predicts x_N, draft 1
    chain          N-1, N, ..     one call each, of (r^1, E draft 1), (r^2, E draft 2), ..; they predict drafts 2, 3, ..

Once the full model has been at the kept drafts' positions, their entries are made again from the true states, over
those of the chain. Shapes: T positions, B = 1, D hidden width, C capacity of the token buffer, V vocabulary, N drafts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.inference.protocol import DecodableModel, DecodingCache
from recycle_ds.inference.speculation.sampling import SamplingParams, most_likely, probabilities, sample


@dataclass(frozen=True)
class Drafts:
    """Drafted tokens; their ids stand in the token buffer, right behind the known ones."""

    count: int
    probs_NV: Tensor | None
    """The distributions they were drawn from; None when greedy."""


class RecycleChain:
    """The recycle module's side of one generation.

    tokens_1C: the buffer of token ids that generation and chain share; drafts are written into it. eos_ids: a draft is
    not continued past one of them.
    """

    def __init__(
        self,
        model: DecodableModel,
        cache: DecodingCache,
        tokens_1C: Tensor,
        params: SamplingParams,
        generator: torch.Generator | None,
        eos_ids: frozenset[int],
    ) -> None:
        self._model = model
        self._cache = cache
        self._tokens_1C = tokens_1C
        self._params = params
        self._generator = generator
        # On a GPU looking at a draft costs a synchronisation, more than drafting on; what follows an end is cut off
        # later.
        self._eos_ids = eos_ids if tokens_1C.device.type == "cpu" else frozenset()
        self._true_entries = 0
        self._pending: list[Tensor] = []
        self.calls = 0
        """Calls of the module so far."""

    @property
    def pending(self) -> int:
        """Positions whose true states are known but not read by the module yet."""
        return sum(len(hidden_TBD) for hidden_TBD in self._pending)

    def add(self, hidden_TBD: Tensor) -> None:
        """Hands over the backbone's states of the next kept positions, in order. Nothing is computed before a draft."""
        if len(hidden_TBD):
            self._pending.append(hidden_TBD)

    def catch_up(self) -> Tensor | None:
        """Reads all pending positions in one call; their next tokens are in the buffer. Returns the last r^1_1BD."""
        if not self._pending:
            return None
        hidden_TBD = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
        self._pending.clear()
        self._cache.recycle.truncate(self._true_entries)
        first = self._true_entries + 1
        self._true_entries += len(hidden_TBD)
        next_tokens_BT = self._tokens_1C[:, first : first + len(hidden_TBD)]
        self.calls += 1
        return self._model.recycle_decode(hidden_TBD, next_tokens_BT, self._cache)[-1:]

    def draft(self, length: int, count: int) -> Drafts:
        """Drafts up to `count` >= 1 tokens behind the `length` known ones; fewer after a drafted end of sequence.

        All positions before the last known token must have been handed over by `add`.
        """
        state_1BD = self.catch_up()
        assert state_1BD is not None and self._true_entries == length - 1, "every draft follows a full call"
        probs: list[Tensor] = []
        for drafted in range(1, count + 1):
            position = length + drafted - 1
            token = self._next(self._model.logits(state_1BD)[0, 0], position, probs)
            self._tokens_1C[0, position] = token
            if drafted == count or (self._eos_ids and int(token) in self._eos_ids):
                break
            self.calls += 1
            state_1BD = self._model.recycle_decode(state_1BD, self._tokens_1C[:, position : position + 1], self._cache)
        return Drafts(drafted, torch.stack(probs) if probs else None)

    def _next(self, logits_V: Tensor, position: int, probs: list[Tensor]) -> Tensor:
        """Chooses the token at `position`, by the full model's own rule; earlier drafts are part of its history."""
        history_L = self._tokens_1C[0, :position]
        if self._params.greedy:
            return most_likely(logits_V, self._params, history_L)
        probs_V = probabilities(logits_V, self._params, history_L)
        probs.append(probs_V)
        return sample(probs_V, self._generator)
