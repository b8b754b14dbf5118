"""State of one sequence being decoded: tokens, KV caches, random generator, counts and clock.

Shapes: T new positions, W = 1 + drafts positions of a verifying call, B = 1, D hidden width, C capacity, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recycle_ds.inference.generation import Generation, Tally
from recycle_ds.inference.protocol import DecodableModel, DecodingCache
from recycle_ds.inference.speculation.drafting import Drafter, Drafts
from recycle_ds.inference.speculation.sampling import (
    TokenSampling,
    distribution,
    most_likely,
    penalise,
    probabilities,
    sample,
)
from recycle_ds.inference.speculation.stopping import FinishReason, StopCondition
from recycle_ds.inference.speculation.verification import Verification, verify_greedy, verify_sampled
from recycle_ds.parallel.device import synchronise

OnTokens = Callable[[list[int], list[bool]], None]


class Stream:
    """State and steps of one generation. The loops of the decoding modes call the steps."""

    def __init__(
        self,
        model: DecodableModel,
        prompt_ids: Sequence[int],
        params: TokenSampling,
        stopping: StopCondition,
        eos_ids: frozenset[int],
        on_tokens: OnTokens | None,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._params = params
        self._on_tokens = on_tokens
        self._clock = clock
        self._started = clock()
        self._first_token_at: float | None = None
        self._device = next(model.parameters()).device
        self._generator = None if params.greedy else _generator(params.seed, self._device)
        self._prompt_tokens = len(prompt_ids)
        self._full_calls = 0
        self._recycled: list[bool] = []
        self._output: list[int] = []
        capacity = len(prompt_ids) + stopping.remaining
        self._tokens_1C = torch.zeros(1, capacity, dtype=torch.long, device=self._device)
        self._tokens_1C[0, : len(prompt_ids)] = torch.tensor(prompt_ids, device=self._device)
        self._cache: DecodingCache = model.new_cache(1, capacity)
        self.drafter = Drafter(model, self._cache, self._tokens_1C, params, self._generator, eos_ids)
        self.stopping = stopping
        self.tally = Tally()
        self.length = len(prompt_ids)
        """Number of known tokens: the prompt and all tokens kept so far."""

    @property
    def running(self) -> bool:
        """Whether no stop condition has been met yet."""
        return self.stopping.reason is None

    def prefill(self, with_module: bool) -> None:
        """Runs the backbone on the prompt and keeps the first token.

        with_module: the recycle module reads the prompt too, except the last position, which needs the first new token.
        """
        hidden_TBD = self.read(self.length)
        if with_module:
            self.drafter.add(hidden_TBD[:-1])
            self.drafter.catch_up()
            self.drafter.add(hidden_TBD[-1:])
        token = self.next_token(hidden_TBD)  # synchronises with the device, including the module's pass
        self._first_token_at = self._clock()
        self.keep([token], [False])

    def read(self, end: int) -> Tensor:
        """Full call over the tokens before `end` that the backbone has not read yet. Returns their hidden states h_TBD."""
        self._full_calls += 1
        return self._model.decode(self._tokens_1C[:, self._cache.backbone.length : end], self._cache)

    def next_token(self, hidden_TBD: Tensor) -> int:
        """Selects the full model's next token from the last of these hidden states and writes it into the buffer."""
        logits_V = self._model.logits(hidden_TBD[-1:])[0, 0]
        history_L = self._tokens_1C[0, : self.length]
        if self._params.greedy:
            token = most_likely(logits_V, self._params, history_L)
        else:
            token = sample(probabilities(logits_V, self._params, history_L), self._generator)
        self._tokens_1C[0, self.length] = token
        return int(token)

    def verify(self, drafts: Drafts) -> tuple[int, int]:
        """Verifies drafts with one full call over the last known token and the drafts. Keeps the accepted drafts and
        one token of the full model.

        Returns how many drafts were tested and how many were accepted, not counting any after the end of the
        generation.
        """
        known = self.length
        hidden_WBD = self.read(known + drafts.count)
        logits_WV = self._model.logits(hidden_WBD)[:, 0]
        verification, ids = self._accept_or_reject(logits_WV, drafts)
        accepted = verification.accepted
        self._cache.backbone.truncate(known + accepted)
        self.drafter.add(hidden_WBD[: accepted + 1])
        kept = self.keep([*ids[:accepted], verification.token], [True] * accepted + [False])
        tested = min(drafts.count, accepted + 1)
        if kept <= accepted:  # an accepted draft ended the generation
            tested = accepted = kept
        self.tally.add(drafts.count, tested, accepted)
        return tested, accepted

    def _accept_or_reject(self, logits_WV: Tensor, drafts: Drafts) -> tuple[Verification, list[int]]:
        """Writes the full model's token into the buffer after the accepted drafts. Also returns the ids of all drafts."""
        known, count, params = self.length, drafts.count, self._params
        if params.penalises:
            # The history of row i includes the drafts before it, as if they had been decoded one by one.
            rows = [
                penalise(row_V, params.repetition_penalty, self._tokens_1C[0, : known + i])
                for i, row_V in enumerate(logits_WV)
            ]
            logits_WV = torch.stack(rows)
        if params.greedy:
            targets_W = logits_WV.argmax(-1)
            # the cycle's only synchronisation
            host = torch.cat((self._tokens_1C[0, known : known + count], targets_W)).tolist()
            ids = host[:count]
            verification = verify_greedy(ids, host[count:])
            self._tokens_1C[0, known + verification.accepted] = targets_W[verification.accepted]
        else:
            ids = self.draft_ids(count)
            verification = verify_sampled(ids, drafts.probs_NV, distribution(logits_WV, params), self._generator)
            self._tokens_1C[0, known + verification.accepted] = verification.token
        return verification, ids

    def draft_ids(self, count: int) -> list[int]:
        """Ids of the `count` tokens in the buffer after the known tokens."""
        return self._tokens_1C[0, self.length : self.length + count].tolist()

    def keep(self, ids: list[int], recycled: list[bool]) -> int:
        """Appends tokens, already in the buffer, to the output, up to the stop condition. Returns how many were kept."""
        kept = self.stopping.take(ids)
        self.length += kept
        self._output += ids[:kept]
        self._recycled += recycled[:kept]
        if self._on_tokens is not None:
            self._on_tokens(ids[:kept], recycled[:kept])
        return kept

    def wait(self) -> None:
        """Waits for the device, so that drafting and verification are timed separately. Needed for measured costs only."""
        synchronise(self._device)

    def result(self, reason: FinishReason) -> Generation:
        """The result so far."""
        now = self._clock()
        first = self._first_token_at if self._first_token_at is not None else now
        return Generation(
            token_ids=tuple(self._output),
            recycled=tuple(self._recycled),
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens,
            full_calls=self._full_calls,
            module_calls=self.drafter.calls,
            drafted=tuple(self.tally.drafted),
            tested=tuple(self.tally.tested),
            accepted=tuple(self.tally.accepted),
            prefill_seconds=first - self._started,
            decode_seconds=now - first,
        )


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
