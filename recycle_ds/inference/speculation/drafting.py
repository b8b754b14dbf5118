"""Drafts the next tokens with the recycle module, from the backbone's latest hidden states.

Offsets (0-based positions, N known tokens, so x_{N-1} is the last). The backbone has read x_0..x_{N-2}. Entry p of the
module's KV cache is computed from (h_p, E x_{p+1}) and predicts x_{p+2}:

    backbone entries  ..N-2        one batched call over those not computed yet; the last r^1 predicts x_N, draft 1
    draft entries     N-1, N, ..   one call each, from (r^1, E draft 1), (r^2, E draft 2), ..; they predict drafts 2, 3, ..

Once the full model has read the accepted drafts, their draft entries are replaced by entries computed from the backbone's
hidden states. Shapes: T positions, B = 1, D hidden width, C capacity of the token buffer, V vocabulary, N drafts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.protocol import DecodableModel, DecodingCache
from recycle_ds.inference.speculation.sampling import most_likely, probabilities, sample


@dataclass(frozen=True)
class Drafts:
    """Draft tokens. Their ids are in the token buffer, directly after the known tokens."""

    count: int
    probs_NV: Tensor | None
    """The distributions they were sampled from; None when greedy."""


class Drafter:
    """Produces the draft tokens of one generation with the recycle module.

    tokens_1C: the token buffer shared with the stream; draft tokens are written into it. eos_ids: drafting stops after one
    of these ids.
    """

    def __init__(
        self,
        model: DecodableModel,
        cache: DecodingCache,
        tokens_1C: Tensor,
        params: TokenSampling,
        generator: torch.Generator | None,
        eos_ids: frozenset[int],
    ) -> None:
        self._model = model
        self._cache = cache
        self._tokens_1C = tokens_1C
        self._params = params
        self._generator = generator
        # On a GPU, reading a draft token needs a synchronisation, which costs more than further drafts. Drafts after an
        # end of sequence are cut off later.
        self._eos_ids = eos_ids if tokens_1C.device.type == "cpu" else frozenset()
        self._backbone_entries = 0
        self._pending: list[Tensor] = []
        self.calls = 0
        """Calls of the recycle module so far."""

    @property
    def pending(self) -> int:
        """Positions whose backbone states the module has not read yet."""
        return sum(len(hidden_TBD) for hidden_TBD in self._pending)

    def add(self, hidden_TBD: Tensor) -> None:
        """Queues the backbone's hidden states of the next known positions, in order. `catch_up` reads them."""
        if len(hidden_TBD):
            self._pending.append(hidden_TBD)

    def catch_up(self) -> Tensor | None:
        """Reads all pending positions in one call, with their next tokens from the buffer. Returns the last r^1_1BD."""
        if not self._pending:
            return None
        hidden_TBD = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
        self._pending.clear()
        self._cache.recycle.truncate(self._backbone_entries)
        first = self._backbone_entries + 1
        self._backbone_entries += len(hidden_TBD)
        next_tokens_BT = self._tokens_1C[:, first : first + len(hidden_TBD)]
        self.calls += 1
        return self._model.recycle_decode(hidden_TBD, next_tokens_BT, self._cache)[-1:]

    def draft(self, length: int, count: int) -> Drafts:
        """Drafts up to `count` >= 1 tokens after the `length` known ones; fewer if an end of sequence is drafted.

        All positions before the last known token must have been queued with `add`.
        """
        state_1BD = self.catch_up()
        assert state_1BD is not None and self._backbone_entries == length - 1, "every draft follows a full call"
        probs: list[Tensor] = []
        for drafted in range(1, count + 1):
            position = length + drafted - 1
            token = self._next_token(self._model.logits(state_1BD)[0, 0], position, probs)
            self._tokens_1C[0, position] = token
            if drafted == count or (self._eos_ids and int(token) in self._eos_ids):
                break
            self.calls += 1
            state_1BD = self._model.recycle_decode(state_1BD, self._tokens_1C[:, position : position + 1], self._cache)
        return Drafts(drafted, torch.stack(probs) if probs else None)

    def _next_token(self, logits_V: Tensor, position: int, probs: list[Tensor]) -> Tensor:
        """Selects the token at `position` by the same rule as the full model. Its history includes earlier drafts."""
        history_L = self._tokens_1C[0, :position]
        if self._params.greedy:
            return most_likely(logits_V, self._params, history_L)
        probs_V = probabilities(logits_V, self._params, history_L)
        probs.append(probs_V)
        return sample(probs_V, self._generator)
