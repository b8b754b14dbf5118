"""Counts of the engine and its worker, for metrics."""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.inference.engine.sequence import Sequence
from recycle_ds.inference.speculation.budget import DraftBudget

CONTEXT_BOUNDS = (256, 1024, 4096, 16384)
"""Upper bounds of the context lengths for which acceptance is counted; longer ones are counted under 0."""


@dataclass(frozen=True)
class Budget:
    """The latest decision of the draft budget. drafts: could be verified; verified: were. made_next: the most drafts that
    a sequence makes next. expected_tokens: of the step. full_call_seconds, first_draft_seconds, further_draft_seconds:
    predicted, the latter for one more draft of every sequence."""

    sequences: int
    drafts: int
    verified: int
    made_next: int
    expected_tokens: float
    full_call_seconds: float
    first_draft_seconds: float
    further_draft_seconds: float


@dataclass(frozen=True)
class Statistics:
    """A snapshot. Answers are counted: a request for n answers counts n times. Tokens, steps, preemptions and the like are
    counted since the start.

    waiting, running: answers now. blocks_used, blocks_total: of the KV cache, now. reused_tokens: positions of prompts
    found in the cache. finished, cancelled, failed: answers that ended. acceptance_by_context: upper bound of the context
    length (0: none), drafts verified, drafts accepted.
    """

    waiting: int
    running: int
    max_batch: int
    max_queued: int
    blocks_used: int
    blocks_total: int
    preemptions: int
    reused_tokens: int
    steps: int
    new_tokens: int
    finished: int
    cancelled: int
    failed: int
    acceptance_by_context: tuple[tuple[int, int, int], ...]
    budget: Budget | None


def latest_budget(budget: DraftBudget) -> Budget | None:
    """The latest decision, None before the first one."""
    decision, costs = budget.decision, budget.costs
    if decision is None:
        return None
    return Budget(
        decision.sequences,
        decision.drafts,
        decision.tokens - decision.sequences,
        decision.made_next,
        decision.expected,
        costs.full_call(decision.tokens),
        first := costs.drafts(decision.adaptive, 1),
        costs.drafts(decision.adaptive, 2) - first,
    )


class AcceptanceByContext:
    """Counts verified and accepted drafts by the length of the context."""

    def __init__(self) -> None:
        self._tested = [0] * (len(CONTEXT_BOUNDS) + 1)
        self._accepted = [0] * (len(CONTEXT_BOUNDS) + 1)
        self._counted: dict[Sequence, tuple[int, int]] = {}

    def observe(self, sequence: Sequence) -> None:
        """Counts what a sequence has verified since the last call. To be called after every step, also the last one."""
        tested, accepted = sum(sequence.tally.tested), sum(sequence.tally.accepted)
        before = self._counted.get(sequence, (0, 0))
        if sequence.ended_at is None:
            self._counted[sequence] = tested, accepted
        else:
            self._counted.pop(sequence, None)
        if tested > before[0]:
            length = len(sequence.tokens)
            place = next((i for i, bound in enumerate(CONTEXT_BOUNDS) if length <= bound), len(CONTEXT_BOUNDS))
            self._tested[place] += tested - before[0]
            self._accepted[place] += accepted - before[1]

    def counts(self) -> tuple[tuple[int, int, int], ...]:
        """See `Statistics.acceptance_by_context`."""
        return tuple(zip((*CONTEXT_BOUNDS, 0), self._tested, self._accepted, strict=True))
