"""Decides what each step computes: which requests run, which prompts are read, which drafts are made and verified.

Pure Python without tensors. `next` makes a plan, `apply` takes in its outcome; with pipeline stages several plans are
under way at once, of different sequences. Sequences are ranked by priority, then by arrival. Waiting raises a priority
by one every `_AGING` steps, so that no request waits for ever. The first in rank is never preempted, so that there is
always progress.

Every step contains all sequences that decode, and at most `chunk` tokens of prompts and about as many drafts that requests
ask for: none can starve the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from recycle_ds.inference.engine.block_tables import BlockTables
from recycle_ds.inference.engine.blocks import BlockPool, OutOfBlocks
from recycle_ds.inference.engine.outcomes import advance
from recycle_ds.inference.engine.plan import Outcome, Part, Plan, Rules
from recycle_ds.inference.engine.sequence import Sequence, shares
from recycle_ds.inference.speculation.budget import DraftBudget
from recycle_ds.inference.speculation.repeats import Repeats
from recycle_ds.inference.speculation.tree import MAX_WIDTH, without_chain

_AGING = 256
"""Steps of waiting that raise a priority by one."""


@dataclass
class Scheduler:
    """Schedules sequences over a pool of blocks.

    max_batch: sequences that run at once. chunk: tokens of prompts in a step. piece: tokens of one prompt in a step in which
    others decode, and half of those of all prompts; None: up to `chunk`. ways: plans under way at once; the sequences that
    decode are divided among them. clock: in seconds, for the figures.
    """

    pool: BlockPool
    max_batch: int
    chunk: int = 256
    piece: int | None = None
    budget: DraftBudget = field(default_factory=DraftBudget)
    clock: Callable[[], float] = time.perf_counter
    ways: int = 1
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    step: int = 0
    preemptions: int = 0
    reused_tokens: int = 0
    """Positions of prompts that were found in the cache."""
    _ended: list[int] = field(default_factory=list)
    _width: int = MAX_WIDTH
    """How many nodes of one depth get children in the trees that are made next."""
    _most: int = 1
    """How many drafts each sequence makes at most of those that its request asks for."""
    tables: BlockTables = field(init=False)

    def __post_init__(self) -> None:
        self.tables = BlockTables(self.pool)

    def forget_prefixes(self) -> None:
        """Forgets all cached prefixes, whose blocks have been written by something else. No sequence may be running."""
        assert not self.running
        self.pool = BlockPool(self.pool.count, self.pool.size)
        self.tables = BlockTables(self.pool)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        sequence.arrival, sequence.started = self.step, self.clock()
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence. One that is part of a step under way ends with this step."""
        sequence.cancelled = True
        if not sequence.in_flight and sequence.ended_at is None:
            self._end(sequence)

    def next(self) -> Plan | None:
        """The next step, of sequences that are in no step under way; None if there is nothing to do."""
        self.step += 1
        self._make_room()
        self._width, self._most = shares(self.running, self.chunk)
        decoding = [one for one in self._ranked(self.running) if one.prefilled]
        decoding = [one for one in decoding if not one.in_flight][: -(-len(decoding) // self.ways)]
        verified = self.budget.verify([one.candidate() for one in decoding])
        parts: list[Part] = []
        for sequence, nodes in zip(decoding, verified, strict=True):
            if sequence in self.running and (part := self._decode(sequence, nodes)) is not None:
                parts.append(part)
        parts += self._prompts(beside_others=bool(parts))
        if not parts:
            return None
        rules: list[tuple[int, Rules]] = []
        for sequence in self.running:
            if sequence.in_flight and not sequence.introduced:
                sequence.introduced = True
                rules.append((sequence.number, sequence.rules))
        return self._plan(parts, rules)

    def _plan(self, parts: Iterable[Part], rules: Iterable[tuple[int, Rules]] = ()) -> Plan:
        copies, moves = self.tables.take_copies(), self.tables.take_moves()
        ended, self._ended = tuple(self._ended), []
        return Plan(tuple(parts), copies, tuple(rules), ended, moves)

    def following(self, plan: Plan) -> Plan | None:
        """The step after one that is under way, planned before its outcome is known; None if that cannot be done.

        Every sequence has to choose exactly one token in both. One that turns out to have ended is computed in vain."""
        parts = {part.sequence: part for part in plan.parts}
        going = [one for one in self._ranked(self.running) if one.stopping.remaining > 1 and not one.cancelled]
        if not going or not all(one.number in parts and parts[one.number].is_plain for one in self.running):
            return None
        if any(one.uses_drafts and not one.grows_trees and one.room > 2 for one in going):
            return None  # memory was short for its drafts
        if self.waiting and len(going) < self.max_batch:
            return None
        if (first := self._next_waiting()) and self._priority(first) > min(map(self._priority, self.running)):
            return None
        written = {one: (parts[one.number].known, parts[one.number].known + 2) for one in going}
        needed = {one: self.tables.needed(one, *slots) for one, slots in written.items()}
        if sum(needed.values()) > self.pool.free:
            return None  # nothing is reserved for a step that may not come
        adaptive = sum(one.grows_trees for one in going)
        if adaptive and not self.budget.gives_up(len(going), adaptive, len(going)):
            return None
        for one, slots in written.items():
            if needed[one]:
                self.tables.reserve(one, *slots)
            one.in_flight += 1
        self.step += 1
        return self._plan([parts[one.number].following(tuple(one.blocks)) for one in going])

    def apply(self, plan: Plan, outcome: Outcome) -> list[Sequence]:
        """Takes in what a step chose. Returns the sequences that ended with it."""
        chosen = {one.sequence: one for one in outcome}
        by_number = {sequence.number: sequence for sequence in self.running}
        done = []
        for part in plan.parts:
            if (sequence := by_number.get(part.sequence)) is None:
                continue  # it ended with the step before, after this one was planned
            if not sequence.cancelled:
                advance(sequence, part, chosen.get(part.sequence), self.tables, self.budget, self.clock)
            sequence.in_flight -= 1
            if sequence.reason is not None:
                self._end(sequence)
                done.append(sequence)
        return done

    def _decode(self, sequence: Sequence, nodes: list[int]) -> Part | None:
        """The part of a sequence that decodes, or None if it was preempted or must wait for memory. nodes: the drafts to be
        verified."""
        drafts = sequence.drafts_to_make(self.budget.draft(sequence.number), self._most)
        while True:
            ids, parents = sequence.judge(nodes)
            tokens = (*sequence.tokens[sequence.cached :], *ids)
            try:
                end = sequence.end_of_step(len(tokens), parents, drafts, self._width)
                self.tables.reserve(sequence, sequence.cached, end)
            except OutOfBlocks:
                if sequence.grows_trees and (nodes or drafts):
                    nodes, drafts = [], 0  # no other sequence is preempted for drafts that may be dropped
                elif not self._preempt_below(sequence):
                    return None
                continue
            return self._part(sequence, tokens, without_chain(parents), len(ids), drafts)

    def _part(
        self, sequence: Sequence, tokens: tuple[int, ...], parents: tuple[int, ...], judged: int, drafts: int
    ) -> Part:
        end = sequence.cached + len(tokens)
        samples = end - judged == len(sequence.tokens)
        reads = sequence.uses_drafts and (drafts > 0 if samples else self.budget.active)
        sequence.in_flight += 1
        return Part(
            sequence=sequence.number,
            start=sequence.cached,
            tokens=tokens,
            judged=judged,
            samples=samples,
            module_start=sequence.module_read if reads else 0,
            drafts=drafts if samples else 0,
            room=sequence.room,
            prompt_tokens=sequence.prompt_tokens,
            blocks=tuple(sequence.blocks),
            targets=sequence.targets(sequence.cached, len(tokens)),
            parents=parents,
            width=self._width if sequence.grows_trees else 0,
            floor=int(1000 * self.budget.floor) if sequence.grows_trees else 0,
        )

    def _prompts(self, *, beside_others: bool) -> Iterable[Part]:
        """Chunks of prompts: of running sequences first, then of waiting ones, as long as there is room."""
        most = min(self.piece, self.chunk) if self.piece and beside_others else self.chunk
        left = min(2 * most, self.chunk)
        parts = []
        for sequence in self._ranked(self.running):
            if left > 0 and not sequence.prefilled and not sequence.in_flight:
                part = self._chunk(sequence, min(left, most))
                left -= len(part.tokens)
                parts.append(part)
        while left > 0 and (admitted := self._admit()) is not None:
            part = self._chunk(admitted, min(left, most))
            left -= len(part.tokens)
            parts.append(part)
        return parts

    def _chunk(self, sequence: Sequence, most: int) -> Part:
        tokens = tuple(sequence.tokens[sequence.cached : sequence.cached + most])
        asked = sequence.drafts_to_make(self.budget.draft(sequence.number), self._most)
        drafts = asked if sequence.cached + len(tokens) == len(sequence.tokens) else 0
        try:
            self.tables.reserve(sequence, sequence.cached, sequence.end_of_step(len(tokens), (), drafts, self._width))
        except OutOfBlocks:
            assert sequence.mode != "alternate"
            drafts = 0  # the prompt's own blocks were reserved when it was admitted
        return self._part(sequence, tokens, (), 0, drafts)

    def _next_waiting(self) -> Sequence | None:
        """The waiting sequence that is next in rank, apart from those that wait for another answer to their prompt."""
        ranked = self._ranked(self.waiting)
        return next((one for one in ranked if not (one.fork_of and one.fork_of.is_awaited)), None)

    def _make_room(self) -> None:
        """Preempts sequences of lower priority than the next waiting one, if that gives it the place and memory it needs."""
        if (sequence := self._next_waiting()) is None:
            return
        needed = -(-self.tables.positions(sequence) // self.pool.size)
        below = [one for one in self.running if self._priority(one) < self._priority(sequence)]
        if self.pool.free + self.pool.held_by([one.blocks for one in below]) < needed:
            return
        for victim in reversed(self._ranked(one for one in below if not one.in_flight)):
            if len(self.running) < self.max_batch and self.pool.free >= needed:
                return
            self._preempt(victim)

    def _admit(self) -> Sequence | None:
        """Moves the next waiting sequence to the running ones, if there is room."""
        sequence = self._next_waiting()
        if sequence is None or len(self.running) >= self.max_batch or not self.tables.place(sequence, self.running):
            return None
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._width, self._most = shares(self.running, self.chunk)
        self.reused_tokens += sequence.cached
        sequence.fork_of = None  # it has its blocks, and need not keep the other answer
        return sequence

    def _preempt_below(self, sequence: Sequence) -> bool:
        """Takes the blocks of the last in rank. Returns False if that is the sequence itself, or nothing can be taken."""
        ranked = self._ranked(one for one in self.running if not one.in_flight)
        if ranked[-1] is not sequence:
            self._preempt(ranked[-1])
            return True
        if len(ranked) == len(self.running) > 1:  # else those under way may free memory
            self._preempt(sequence)
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks. It keeps its tokens, and reads them again when its turn comes."""
        self.running.remove(sequence)
        self.tables.release(sequence)
        sequence.forget_drafts()
        sequence.fork_of = None
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.append(sequence)

    def _end(self, sequence: Sequence) -> None:
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.tables.release(sequence)
        sequence.ended_at = self.clock()
        self.budget.forget(sequence.number)
        sequence.repeats = Repeats()  # its index of the text is as large as the text
        if sequence.introduced:
            self._ended.append(sequence.number)

    def _priority(self, sequence: Sequence) -> int:
        return sequence.priority + (self.step - sequence.arrival) // _AGING

    def _ranked(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        return sorted(sequences, key=lambda one: (-self._priority(one), one.number))

    def state(self) -> dict[str, object]:
        """The complete state, to print or compare: copies, which later steps do not change."""
        numbers = {"step": self.step, "preemptions": self.preemptions, "reused_tokens": self.reused_tokens}
        own = {"width": self._width, "ended": tuple(self._ended), "budget": repr(self.budget)}
        waiting, running = ([one.summary() for one in self._ranked(group)] for group in (self.waiting, self.running))
        blocks = {"pool": self.pool.state(), **self.tables.pending()}
        return {**numbers, **own, **blocks, "waiting": waiting, "running": running}

    def check(self) -> None:
        """Asserts that no block is lost or used twice."""
        self.pool.check([one.blocks for one in self.running])
        assert not any(one.blocks for one in self.waiting), "a waiting sequence holds blocks"
