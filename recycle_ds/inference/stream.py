"""One sequence being decoded: its tokens, caches, random numbers, counts and clock.

Shapes: T new positions, W = 1 + drafts positions of a judging call, B = 1, D hidden width, C capacity, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recycle_ds.inference.generation import Generation, Tally
from recycle_ds.inference.protocol import DecodableModel, DecodingCache
from recycle_ds.inference.speculation.drafting import Drafts, RecycleChain
from recycle_ds.inference.speculation.sampling import (
    SamplingParams,
    distribution,
    most_likely,
    penalise,
    probabilities,
    sample,
)
from recycle_ds.inference.speculation.stopping import FinishReason, StopCondition
from recycle_ds.inference.speculation.verification import Verdict, verify_greedy, verify_sampled
from recycle_ds.parallel.device import synchronise

OnTokens = Callable[[list[int], list[bool]], None]


class Stream:
    """State of one generation; the modes' loops call its steps."""

    def __init__(
        self,
        model: DecodableModel,
        prompt_ids: Sequence[int],
        params: SamplingParams,
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
        self.chain = RecycleChain(model, self._cache, self._tokens_1C, params, self._generator, eos_ids)
        self.stopping = stopping
        self.tally = Tally()
        self.length = len(prompt_ids)
        """Tokens known: the prompt and what was kept."""

    @property
    def open(self) -> bool:
        """Whether the generation goes on."""
        return self.stopping.reason is None

    def prefill(self, with_module: bool) -> None:
        """Reads the prompt and keeps the first token; the module too reads it, as far as it can before that token."""
        hidden_TBD = self.read(self.length)
        if with_module:
            self.chain.add(hidden_TBD[:-1])
            self.chain.catch_up()
            self.chain.add(hidden_TBD[-1:])
        token = self.choose(hidden_TBD)  # the host waits for the device here, the module's pass included
        self._first_token_at = self._clock()
        self.keep([token], [False])

    def read(self, end: int) -> Tensor:
        """A full call over the tokens up to `end` that the backbone has not read. Returns their states h_TBD."""
        self._full_calls += 1
        return self._model.decode(self._tokens_1C[:, self._cache.backbone.length : end], self._cache)

    def choose(self, hidden_TBD: Tensor) -> int:
        """The full model's token behind the known ones, from the last of these states."""
        logits_V = self._model.logits(hidden_TBD[-1:])[0, 0]
        history_L = self._tokens_1C[0, : self.length]
        if self._params.greedy:
            token = most_likely(logits_V, self._params, history_L)
        else:
            token = sample(probabilities(logits_V, self._params, history_L), self._generator)
        self._tokens_1C[0, self.length] = token
        return int(token)

    def judge(self, drafts: Drafts) -> tuple[int, int]:
        """A full call over the last known token and the drafts behind it; keeps those it agrees with and one of its
        own.

        Returns how many drafts were judged and how many were accepted, not counting any behind the end of the
        generation.
        """
        known = self.length
        hidden_WBD = self.read(known + drafts.count)
        logits_WV = self._model.logits(hidden_WBD)[:, 0]
        verdict, ids = self._verdict(logits_WV, drafts)
        accepted = verdict.accepted
        self._cache.backbone.truncate(known + accepted)
        self.chain.add(hidden_WBD[: accepted + 1])
        kept = self.keep([*ids[:accepted], verdict.token], [True] * accepted + [False])
        tested = min(drafts.count, accepted + 1)
        if kept <= accepted:  # an accepted draft ended the generation
            tested = accepted = kept
        self.tally.add(drafts.count, tested, accepted)
        return tested, accepted

    def _verdict(self, logits_WV: Tensor, drafts: Drafts) -> tuple[Verdict, list[int]]:
        """Accepts or rejects, puts the full model's own token behind the accepted drafts. Also returns all drafts."""
        known, count, params = self.length, drafts.count, self._params
        if params.penalises:
            # Row i is judged with the drafts before it in its history, as if they had been kept one by one.
            rows = [
                penalise(row_V, params.repetition_penalty, self._tokens_1C[0, : known + i])
                for i, row_V in enumerate(logits_WV)
            ]
            logits_WV = torch.stack(rows)
        if params.greedy:
            targets_W = logits_WV.argmax(-1)
            host = torch.cat((self._tokens_1C[0, known : known + count], targets_W)).tolist()  # the cycle's only wait
            ids = host[:count]
            verdict = verify_greedy(ids, host[count:])
            self._tokens_1C[0, known + verdict.accepted] = targets_W[verdict.accepted]
        else:
            ids = self.ids(count)
            verdict = verify_sampled(ids, drafts.probs_NV, distribution(logits_WV, params), self._generator)
            self._tokens_1C[0, known + verdict.accepted] = verdict.token
        return verdict, ids

    def ids(self, count: int) -> list[int]:
        """The `count` tokens in the buffer behind the known ones."""
        return self._tokens_1C[0, self.length : self.length + count].tolist()

    def keep(self, ids: list[int], recycled: list[bool]) -> int:
        """Makes tokens, already in the buffer, known: as many as the stop condition allows. Returns that number."""
        kept = self.stopping.take(ids)
        self.length += kept
        self._output += ids[:kept]
        self._recycled += recycled[:kept]
        if self._on_tokens is not None:
            self._on_tokens(ids[:kept], recycled[:kept])
        return kept

    def wait(self) -> None:
        """Waits for the device, so that the clock splits a cycle rightly. Only measuring needs it."""
        synchronise(self._device)

    def result(self, reason: FinishReason) -> Generation:
        """What was produced up to now."""
        now = self._clock()
        first = self._first_token_at if self._first_token_at is not None else now
        return Generation(
            token_ids=tuple(self._output),
            recycled=tuple(self._recycled),
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens,
            full_calls=self._full_calls,
            module_calls=self.chain.calls,
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
