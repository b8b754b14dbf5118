"""A sequence: one answer being decoded, as the scheduler sees it. No tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields

from recycle_ds.inference.engine.plan import Rules
from recycle_ds.inference.generation import Generation, Logprobs, Tally
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.speculation.acceptance import MAX_DRAFT, Candidate
from recycle_ds.inference.speculation.repeats import Repeats
from recycle_ds.inference.speculation.stopping import FinishReason, StopCondition
from recycle_ds.inference.speculation.tree import (
    depths,
    grafted,
    main_path_first,
    parents_of,
    path_of,
    renumbered,
    width_of,
    without_chain,
)

_NOT_OF_THE_STATE = {
    *("params", "rules", "stopping", "on_tokens", "fork_of", "repeats", "tally", "logprobs", "prompt_logprobs"),
    *("rejected", "started", "first_token_at", "ended_at"),
}
OnTokens = Callable[[list[int], list[bool]], None]


@dataclass(eq=False)
class Sequence:
    """State of one answer. Positions count from 0; `tokens` holds the prompt and all new tokens."""

    number: int
    tokens: list[int]
    prompt_tokens: int
    mode: str
    params: SamplingParams
    rules: Rules
    stopping: StopCondition
    priority: int = 0
    arrival: int = 0
    """Step in which it was added."""
    on_tokens: OnTokens | None = None
    fork_of: Sequence | None = None
    """Another answer to the same prompt, whose blocks this one shares."""
    cached: int = 0
    """Positions that the backbone has read: their keys and values are in the cache."""
    module_read: int = 1
    """First slot that the recycle module has not read. Slot 0 has no entry."""
    blocks: list[int] = field(default_factory=list)
    registered: int = 0
    """Blocks whose content is registered for others."""
    registered_with_module: int = 0
    """The first of them that also have all the module's entries."""
    content: int = 0
    """Content of the last registered block."""
    drafts: tuple[int, ...] = ()
    """Drafts after the last token, among which those to be verified are chosen."""
    parents: tuple[int, ...] = ()
    """Their parents, see tree.py; empty for a chain."""
    confidences: tuple[float, ...] = ()
    grown: int = 0
    """How many of the drafts, the first ones, are the recycle module's; the others repeat what followed earlier in the text."""
    repeated: frozenset[int] = frozenset()
    """Drafts, by number, that have their confidence from repetition."""
    repeats: Repeats = field(default_factory=Repeats)
    judged: tuple[int, ...] = ()
    """The drafts that the step under way verifies, by their number from 1 on, in its order."""
    ordered: int = 0
    """Drafts, one after the other, that the latest step was to make."""
    introduced: bool = False
    """Whether the runner knows its rules."""
    in_flight: int = 0
    """Steps whose outcome is not known yet that it is part of."""
    cancelled: bool = False
    recycled: list[bool] = field(default_factory=list)
    logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    prompt_logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    full_calls: int = 0
    module_calls: int = 0
    preemptions: int = 0
    reused: int = 0
    """Positions of its prompt that were found in the cache when it first ran."""
    rejected: dict[int, tuple[int, ...]] | None = None
    """For whoever sets it to {}: the drafts that verification rejected, by the number of the new token that came instead."""
    started: float = 0.0
    first_token_at: float | None = None
    ended_at: float | None = None

    @property
    def reason(self) -> FinishReason | None:
        """Why it ended; None while it runs."""
        return "interrupted" if self.cancelled and self.stopping.reason is None else self.stopping.reason

    @property
    def prefilled(self) -> bool:
        """Whether only tokens that were just decoded are unread."""
        return self.cached >= self.prompt_tokens and len(self.tokens) - self.cached <= 1 + self.unverified

    @property
    def unverified(self) -> int:
        """Recycled tokens that `alternate` kept since the last token of the full model."""
        count = 0
        while count < len(self.recycled) and self.mode == "alternate" and self.recycled[-1 - count]:
            count += 1
        return count

    @property
    def uses_drafts(self) -> bool:
        """Whether the recycle module takes part."""
        return self.mode != "autoregressive" and self.params.draft_tokens != 0

    @property
    def fixed_drafts(self) -> int | None:
        """Drafts per full call if the request says so; None if they are adaptive."""
        if self.params.draft_tokens is None and self.mode == "alternate":
            return 1
        return self.params.draft_tokens

    def drafts_to_make(self, budgeted: int, most: int) -> int:
        """How many drafts, one after the other, its next step makes. Of those that are asked for, `verified` makes `most` at
        most, which changes no text."""
        if not self.uses_drafts:
            return 0
        asked = self.fixed_drafts
        drafts = budgeted if asked is None else min(asked, most) if self.mode == "verified" else asked
        return max(min(drafts, self.room - 1), 0)

    @property
    def grows_trees(self) -> bool:
        """Whether its drafts are trees of the likeliest tokens, which any number of may be verified, not chains."""
        return self.mode == "verified" and self.params.draft_tokens is None

    def candidate(self) -> Candidate:
        """What the draft budget has to know of it."""
        fixed, room = self.fixed_drafts if self.uses_drafts else 0, max(self.stopping.remaining - 1, 0)
        return Candidate(
            self.number, self.confidences, fixed, room, self.parents, not self.params.greedy, self.repeated
        )

    def keep_drafts(
        self, ids: tuple[int, ...], parents: tuple[int, ...], confidences: tuple[float, ...], *, repeated: bool
    ) -> None:
        """Keeps the module's drafts after the last token and, in trees, what followed when the text ended like this before,
        if that may be `repeated`."""
        self.drafts, self.parents, self.confidences = ids, parents, confidences
        self.grown = len(ids)
        found = self.repeats.find(self.tokens, MAX_DRAFT) if self.grows_trees and repeated else None
        if found is not None:
            chain = list(zip(found.tokens, found.confidences, strict=True))
            drafts, of, values, self.repeated = grafted(ids, parents, confidences, chain)
            self.drafts, self.parents, self.confidences = tuple(drafts), without_chain(of), tuple(values)

    def judge(self, nodes: Collection[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Chooses drafts to be verified, by their numbers. Returns ids and parents in the order in which they are read."""
        if not nodes:  # in a large batch most, and every one takes time
            self.judged = ()
            return (), ()
        parents = parents_of(len(self.drafts), self.parents)
        order = main_path_first(parents, set(nodes), self.confidences)
        self.judged = tuple(order)
        return tuple(self.drafts[node - 1] for node in order), renumbered(parents, order)

    @property
    def room(self) -> int:
        """Tokens that can still be of use: a full call adds a token itself, so `verified` never drafts the last one."""
        return self.stopping.remaining - (self.mode == "verified")

    @property
    def is_awaited(self) -> bool:
        """Whether other answers to its prompt wait until it has read it. Not if it was preempted: perhaps for one of them."""
        return self.ended_at is None and self.preemptions == 0 and self.cached < self.prompt_tokens

    def end_of_step(self, tokens: int, parents: tuple[int, ...], drafts: int, width: int) -> int:
        """First position that a step does not write, which reads some tokens, the last of which are drafts with these
        parents, and makes drafts, `width` nodes of each depth with children."""
        if not self.grows_trees:  # a new token and drafts in a chain, within the longest text
            # Whether there is memory for drafts that are verified must not depend on what was drawn. A chain ends with an end
            # token: if only short ones fitted, and longer ones were drawn again later, a text would end too early too often.
            missing = max(self.ordered - len(self.drafts), 0) if self.mode == "verified" and self.drafts else 0
            return min(self.cached + tokens + missing + 1 + drafts, len(self.tokens) + self.stopping.remaining)
        read = self.cached + tokens
        known = read - len(parents) + max(depths(parents), default=0) + 1  # if the longest path is accepted
        return max(read, known + max(drafts - 1, 0) * width)

    def targets(self, start: int, count: int) -> tuple[int, ...]:
        """Tokens of the prompt to be scored by a step that reads `count` tokens from `start` on."""
        if not self.params.prompt_logprobs or len(self.prompt_logprobs) >= self.prompt_tokens - 1:
            return ()
        return tuple(self.tokens[start + 1 : min(start + count + 1, self.prompt_tokens)])

    def keep_scores(self, start: int, scores: Logprobs) -> None:
        """Keeps what a step scored that read the prompt from `start` on. A preempted sequence reads and scores it again."""
        if scores:
            self.prompt_logprobs[start:] = scores

    def summary(self) -> dict[str, object]:
        """Its state for the scheduler, as a copy, to print or compare: all but its request, callbacks, the text filter, counts,
        scores and times, and the index of repetitions, which follows from its tokens."""
        found: dict[str, object] = {}
        for each in fields(self):
            if each.name not in _NOT_OF_THE_STATE:
                value = getattr(self, each.name)
                found[each.name] = tuple(value) if isinstance(value, list) else value
        fork = None if self.fork_of is None else self.fork_of.number
        return found | {"fork_of": fork, "remaining": self.stopping.remaining, "reason": self.reason}

    def take(self, ids: list[int], recycled: list[bool], judged: int = 0) -> int:
        """Appends tokens up to the stop condition, and calls `on_tokens`. judged: how many drafts the step verified; the
        last id follows the accepted ones. Returns how many were kept."""
        kept = self.stopping.take(ids)
        if self.rejected is not None and kept == len(ids) <= judged and (rejected := self._rejected_drafts(ids[:-1])):
            self.rejected[len(self.tokens) - self.prompt_tokens + kept - 1] = rejected
        self.tokens += ids[:kept]
        self.recycled += recycled[:kept]
        if self.on_tokens is not None and kept:
            self.on_tokens(ids[:kept], recycled[:kept])
        return kept

    def _rejected_drafts(self, accepted: list[int]) -> tuple[int, ...]:
        """The verified drafts that followed the accepted ones; of a tree, the likeliest ones."""
        parents = parents_of(len(self.drafts), self.parents)
        path = path_of(self.drafts, self.parents, accepted)
        node, found = path[-1] if path else 0, []
        while (node := next((one for one in self.judged if parents[one - 1] == node), 0)) > 0:
            found.append(self.drafts[node - 1])
        return tuple(found)

    def forget_drafts(self) -> None:
        """Drops all drafts."""
        self.drafts, self.parents, self.confidences, self.judged, self.ordered = (), (), (), (), 0
        self.grown, self.repeated = 0, frozenset()

    def generation(self, now: float) -> Generation:
        """The result so far."""
        first = self.first_token_at if self.first_token_at is not None else now
        return Generation(
            token_ids=tuple(self.tokens[self.prompt_tokens :]),
            recycled=tuple(self.recycled),
            finish_reason=self.reason or "interrupted",
            prompt_tokens=self.prompt_tokens,
            full_calls=self.full_calls,
            module_calls=self.module_calls,
            drafted=tuple(self.tally.drafted),
            tested=tuple(self.tally.tested),
            accepted=tuple(self.tally.accepted),
            prefill_seconds=first - self.started,
            decode_seconds=(self.ended_at if self.ended_at is not None else now) - first,
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
        )


def shares(running: Collection[Sequence], most: int) -> tuple[int, int]:
    """How many nodes of one depth get children in the trees of some sequences, and how long the chains are at most that
    requests ask for in `verified`, if no more than about `most` drafts are to be verified in a step."""
    asking = sum(one.mode == "verified" and one.uses_drafts and not one.grows_trees for one in running)
    return width_of(sum(one.grows_trees for one in running)), max(most // max(asking, 1), 1)
