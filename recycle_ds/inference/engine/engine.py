"""The engine: requests in, answers out. One decode path for one stream and for many.

A step is `plan = scheduler.next()`, `outcome = run(plan)`, `scheduler.apply(plan, outcome)`. The scheduler is pure
Python and the runner knows nothing of requests; the executor between them runs plans here or on many ranks.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from recycle_ds.inference.engine.blocks import BlockPool
from recycle_ds.inference.engine.costs import measurement
from recycle_ds.inference.engine.costs.cost_file import CostFile
from recycle_ds.inference.engine.executor import Executor
from recycle_ds.inference.engine.plan import Outcome, Plan, Rules
from recycle_ds.inference.engine.scheduler import Scheduler
from recycle_ds.inference.engine.sequence import OnTokens, Sequence
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.parameters import SEED_LIMIT, SamplingParams, check_logprobs, check_mode, token_ids
from recycle_ds.inference.protocol import NewTextSource
from recycle_ds.inference.speculation.cost_model import CostModel
from recycle_ds.inference.speculation.stopping import FinishReason, StopCondition, TextFilter


@dataclass(frozen=True)
class _UnderWay:
    """A step that has been started: when, unless while another one was computed; and the executor's `first_runs` before it."""

    plan: Plan
    start: float | None = None
    first_runs: int | None = None


class DecodingEngine:
    """Decodes many requests at once. Statistics of drafts carry over to later requests."""

    def __init__(
        self,
        executor: Executor,
        *,
        vocab_size: int,
        max_positions: int,
        has_module: bool,
        blocks: int,
        block_size: int = 16,
        max_batch: int = 8,
        eos_ids: Iterable[int] = (),
        unnamed_ids: Iterable[int] = (),
        text_source: NewTextSource | None = None,
        clock: Callable[[], float] = time.perf_counter,
        cost_file: CostFile | None = None,
    ) -> None:
        """eos_ids: end-of-sequence tokens. unnamed_ids: ids without a token, never sampled. text_source: creates a
        detokeniser; needed for stop strings only. clock: in seconds, for the figures of an answer."""
        self._executor = executor
        self.vocab_size, self.max_positions, self.has_module = vocab_size, max_positions, has_module
        self._eos_ids = tuple(sorted(set(eos_ids)))
        self._unnamed_ids = frozenset(unnamed_ids)
        self._text_source, self._cost_file = text_source, cost_file
        self.scheduler = Scheduler(BlockPool(blocks, block_size), max_batch, clock=clock, ways=executor.depth)
        self.looks_ahead = True
        """Whether the next step is planned and started while a device computes the one before, where that can be done."""
        self._under_way: deque[_UnderWay] = deque()
        self._settled: list[Sequence] = []
        """Sequences that have ended since the last step, of which nobody has been told."""
        self._costs_are_measured = False
        self._next_number = 0

    def step(self) -> list[Sequence]:
        """Computes one step. Returns the sequences that ended with it, and those that `settle` has ended since the last one.
        Any exception ends all sequences."""
        try:
            self._start_steps()
            if not self._under_way:
                return []
            step = self._under_way.popleft()
            following = self._start_following(step.plan)
            outcome = self._executor.collect()
            self._under_way += following
            self._time(step, outcome)
            ended = self.scheduler.apply(step.plan, outcome)
            return ended + self._take_settled()
        except BaseException:
            self.abort()
            raise

    def _start_steps(self) -> None:
        """Plans and starts as many steps as can be under way at once."""
        while len(self._under_way) < self._executor.depth and (plan := self.scheduler.next()) is not None:
            self._under_way.append(_UnderWay(plan, time.perf_counter(), self._executor.first_runs))
            self._executor.submit(plan)
        assert self._under_way or not self.unfinished, f"no sequence can proceed: {self.scheduler.state()}"

    def _start_following(self, plan: Plan) -> list[_UnderWay]:
        """Plans and starts the step after one that a device is computing, if it can be planned already."""
        is_ahead = self.looks_ahead and self._executor.computing
        following = self.scheduler.following(plan) if is_ahead else None
        if following is None:
            return []
        self._executor.submit(following)
        return [_UnderWay(following)]

    def _time(self, step: _UnderWay, outcome: Outcome) -> None:
        """Tells the draft budget what a step took. With pipeline stages that includes waiting for the plans before it: about
        as long as a single plan takes through all stages, which is what was measured at the start."""
        if step.start is None or step.first_runs != self._executor.first_runs:
            return  # started early, or something was new and took longer for it
        plan = step.plan
        if all(part.is_budgeted for part in plan.parts):
            calls = {one.sequence: one.calls for one in outcome}
            made = [calls.get(part.sequence, 0) for part in plan.parts]
            ordered = max(part.drafts for part in plan.parts)
            self.scheduler.budget.time(plan.tokens, made, ordered, time.perf_counter() - step.start)

    def _take_settled(self) -> list[Sequence]:
        self.settle()
        settled, self._settled = self._settled, []
        return settled

    def settle(self) -> None:
        """Ends what was planned before it was known that all its sequences would end, or be cancelled. To be called after
        cancelling without a further step: until then cancelled sequences may be part of one."""
        while self._under_way and all(one.cancelled for one in self.scheduler.running):
            self._settled += self.scheduler.apply(self._under_way.popleft().plan, self._executor.collect())

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Runs steps until these sequences have ended."""
        left = set(sequences)
        while any(sequence.ended_at is None for sequence in left):
            self.step()

    @property
    def first_runs(self) -> int | None:
        """How many shapes of steps were new so far, and took longer for it: CUDA graphs that were captured. None where that
        makes no difference."""
        return self._executor.first_runs

    @property
    def unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._under_way)

    def add(
        self,
        prompt_ids: Iterable[int],
        params: SamplingParams,
        mode: str = "verified",
        *,
        priority: int = 0,
        on_tokens: OnTokens | None = None,
    ) -> list[Sequence]:
        """Queues a request and returns its `params.n` answers. Raises DecodingError for one that cannot be decoded.

        priority: higher ones run first. on_tokens: called with an answer's new ids and, for each, whether it was
        recycled.
        """
        prompt = token_ids(prompt_ids)
        self.check(prompt, params, mode)
        if not isinstance(priority, int):
            raise DecodingError(f"priority={priority!r}: must be a whole number; higher ones run first")
        if on_tokens is not None and not callable(on_tokens):
            raise DecodingError(f"on_tokens={on_tokens!r}: must be a function of ids and of whether each was recycled")
        if mode == "verified" and params.draft_tokens is None:
            self.measure_costs()
        answers: list[Sequence] = []
        for index in range(params.n):
            seed = secrets.randbelow(SEED_LIMIT) if params.seed is None else (params.seed + index) % SEED_LIMIT
            own = params if params.seed is None else replace(params, seed=seed)
            own = replace(own, prompt_logprobs=False) if answers else own  # the first answer scores their prompt
            end_ids = self._end_ids(params)
            sequence = Sequence(
                self._next_number,
                list(prompt),
                len(prompt),
                mode,
                own,
                Rules(own.token_sampling, seed, end_ids),
                self._stopping(prompt, params, end_ids),
                priority,
                on_tokens=on_tokens,
                fork_of=answers[0] if answers else None,
            )
            self._next_number += 1
            self.scheduler.add(sequence)
            answers.append(sequence)
        return answers

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence early. Its blocks are free when the steps under way, if any, have ended: see `settle`."""
        self.scheduler.cancel(sequence)

    def abort(self) -> None:
        """Ends all sequences after an exception in the middle of a step, so that the engine can go on with others."""
        self._under_way.clear()
        self._executor.discard()
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            sequence.in_flight = 0
            self.scheduler.cancel(sequence)
        self.scheduler.forget_prefixes()  # what the step was to move or write into their blocks may be missing

    def check(self, prompt: list[int], params: SamplingParams, mode: str) -> None:
        """Raises DecodingError for a request that cannot be decoded."""
        check_mode(mode)
        if not isinstance(params, SamplingParams):
            raise DecodingError(f"params={params!r}: must be SamplingParams")
        if mode != "autoregressive" and not self.has_module:
            raise DecodingError(
                f"mode={mode}: the model has no recycle module; use --mode autoregressive, or train one"
            )
        check_logprobs(mode, params.logprobs)
        if not prompt:
            raise DecodingError("the prompt is empty: give at least one token")
        if len(prompt) >= self.max_positions:
            raise DecodingError(
                f"the prompt has {len(prompt)} tokens, the model's context holds {self.max_positions}, "
                f"including one new token: shorten the prompt to at most {self.max_positions - 1} tokens"
            )
        wrong = [token for token in prompt if not 0 <= token < self.vocab_size]
        if wrong:
            raise DecodingError(
                f"the prompt contains the token {wrong[0]}, outside the model's vocabulary of {self.vocab_size}: "
                "encode it with the model's own tokenizer"
            )
        for name, token in params.named_tokens:
            if token >= self.vocab_size:
                raise DecodingError(
                    f"{name}: the token id {token} is none of the model's, which are 0 to {self.vocab_size - 1}; leave it out"
                )
        tokens = self.vocab_size - len(self._unnamed_ids)
        if params.logprobs is not None and params.logprobs > tokens:
            raise DecodingError(f"logprobs={params.logprobs}: the model's vocabulary has {tokens} tokens")
        barred = {*self._unnamed_ids, *params.bad_tokens, *(self._end_ids(params) if params.min_new_tokens else ())}
        if len(barred) >= self.vocab_size or (params.allowed_tokens and not set(params.allowed_tokens) - barred):
            raise DecodingError("no token is left to choose: bad_tokens and min_new_tokens bar all allowed ones")
        if params.stop and self._text_source is None:
            raise DecodingError(
                f"stop={list(params.stop)!r}: stop strings need a tokenizer, and this decoder was built without one"
            )
        pool = self.scheduler.pool
        # a step may write drafts after the last token that is kept
        needed = -(-min(len(prompt) + params.max_new_tokens + 1, self.max_positions + 1) // pool.size) + 1
        if needed > pool.count:
            raise DecodingError(
                f"prompt and new tokens need {needed * pool.size} positions of KV cache, which holds "
                f"{pool.count * pool.size}: raise --kv-memory-gib, or lower max_new_tokens={params.max_new_tokens}"
            )

    def _end_ids(self, params: SamplingParams) -> tuple[int, ...]:
        return params.stop_tokens if params.ignore_eos else (*self._eos_ids, *params.stop_tokens)

    def _stopping(self, prompt: list[int], params: SamplingParams, end_ids: tuple[int, ...]) -> StopCondition:
        room = self.max_positions - len(prompt)
        reason: FinishReason = "length" if params.max_new_tokens <= room else "context"
        text = None
        if params.stop and self._text_source:
            text = TextFilter(self._text_source(prompt), params.stop, params.min_new_tokens)
        return StopCondition(frozenset(end_ids), min(params.max_new_tokens, room), reason, text)

    def measure_costs(self) -> CostModel:
        """Measures what calls cost, once, if nothing is under way. Returns what the draft budget counts with.

        The first `verified` request does this itself. Call it before others if it may come while they are being decoded.
        """
        self.settle()
        if not self._costs_are_measured and not self.unfinished:
            self.scheduler.forget_prefixes()  # their blocks are about to be written
            pool = self.scheduler.pool
            try:
                arguments = (pool.count, pool.size, self.max_positions, self.scheduler.max_batch, self.has_module)
                self.use_costs(measurement.known_or_measured(self._executor, self._cost_file, *arguments))
            except BaseException:
                self._executor.discard()
                raise
        return self.scheduler.budget.costs

    def use_costs(self, known: CostModel) -> None:
        """Lets the draft budget count with known costs instead of measured ones."""
        self.scheduler.budget.costs = known
        self._costs_are_measured = True

    def explanation(self) -> str:
        """The latest decision of the draft budget and, if no step is under way, how busy the ranks were."""
        ranks = "" if self._under_way else self._executor.explanation()
        return "; ".join(part for part in (self.scheduler.budget.explanation, ranks) if part)

    def keep_alive(self) -> None:
        """To be called at least every few minutes while there is nothing to do: other ranks wait for the next step."""
        self._executor.keep_alive()

    def close(self) -> None:
        """Ends the other ranks' part."""
        self._executor.close()
