"""What one step computes, as plain integers: small enough to be sent to every rank in one message.

Positions count from 0. The backbone reads the `tokens` of each part at positions start, start + 1, ...; nothing is
padded. The last `judged` tokens are drafts that this pass verifies: a chain, or the nodes of a tree (see spans.py), of
which the accepted ones are moved to their own positions afterwards. Slot q of the recycle module's cache is made from
(h_{q-1}, E x_q), so that everything stored at a position depends only on the tokens up to that position, and a shared
prefix is complete.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

from recycle_ds.inference.generation import Logprobs
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.parameters import TokenSampling

PENDING = -1
"""In place of a token: the one that the step before has chosen, which the device has stored where it belongs."""


@dataclass(frozen=True)
class Part:
    """One sequence's part of a step."""

    sequence: int
    """Number of the sequence."""
    start: int
    """Position of the first token."""
    tokens: tuple[int, ...]
    """Tokens that the backbone reads: a chunk of the prompt, or the latest token followed by drafts."""
    judged: int
    """How many of the last tokens are drafts to be verified."""
    samples: bool
    """Whether a token is chosen after the last one: not for a chunk that ends inside the prompt."""
    module_start: int
    """First slot of the recycle module's cache that is missing; 0 if the module does not run in this step."""
    drafts: int
    """Drafts to make after the chosen token, one after the other; 0 for none."""
    room: int
    """Tokens, chosen and drafted together, that can still be of use from this step on."""
    prompt_tokens: int
    """Length of the prompt, for penalties that count new tokens only."""
    blocks: tuple[int, ...]
    """Blocks of the cache, for all positions that this step writes."""
    targets: tuple[int, ...] = ()
    """Tokens of the prompt that follow the first tokens of this part, to be scored."""
    parents: tuple[int, ...] = ()
    """Parents of the drafts that are verified, see tree.py; empty for a chain."""
    width: int = 0
    """Drafts of one depth that get children, of a tree of the likeliest tokens; 0 for a chain."""
    floor: int = 0
    """Thousandths: a tree ends where the chances of the drafts that would get children sum to less."""

    @property
    def known(self) -> int:
        """Number of tokens that are certain before this step: all but the drafts."""
        return self.start + len(self.tokens) - self.judged

    @property
    def is_budgeted(self) -> bool:
        """Whether it is one of those whose costs the draft budget knows: a plain step, or one with a tree. Chunks of prompts,
        chains and recycled tokens cost something else."""
        plain = len(self.tokens) == 1 and self.module_start == 0
        return self.start >= self.prompt_tokens and (plain or self.width > 0)

    @property
    def is_plain(self) -> bool:
        """Whether it yields exactly one token, and no drafts: what follows can be planned before it has run."""
        return self.samples and self.judged == 0 and self.drafts == 0 and self.module_start == 0

    def following(self, blocks: tuple[int, ...]) -> Part:
        """The same sequence's part of the next step, if this one is plain: it reads the token that this one chooses."""
        # not by `replace`, which takes ten times as long: this is done for all sequences while a GPU computes
        return Part(
            self.sequence, self.known, (PENDING,), 0, samples=True, module_start=0, drafts=0, room=self.room - 1,
            prompt_tokens=self.prompt_tokens, blocks=blocks, width=self.width, floor=self.floor,
        )  # fmt: skip

    @property
    def judged_ids(self) -> tuple[int, ...]:
        """The drafts to be verified."""
        return self.tokens[len(self.tokens) - self.judged :]

    def span(self) -> Span:
        """Where the tokens are in the cache."""
        root = self.known - 1 if self.parents else 0
        return Span(self.blocks, self.start, len(self.tokens), root=root, parents=self.parents)

    def moves(self, path: Sequence[int], size: int) -> list[tuple[int, int]]:
        """What accepted drafts have to be moved to their own positions: slots (from, to). path: their nodes. size: positions
        of a block."""
        root = self.known - 1

        def slot(at: int) -> int:
            return self.blocks[at // size] * size + at % size

        return [(slot(root + node), slot(root + depth)) for depth, node in enumerate(path, start=1) if node != depth]

    def module_slots(self, tokens: Sequence[int], end_ids: Sequence[int]) -> range:
        """Slots that the module reads in this step, if `tokens` are chosen: none if nothing is drafted after a chosen token."""
        if not self.module_start or (
            self.samples and (self.drafts_after(tokens) == 0 or not set(end_ids).isdisjoint(tokens))
        ):
            return range(0)
        return range(self.module_start, self.known + len(tokens))

    def drafts_after(self, tokens: Sequence[int]) -> int:
        """How many drafts are made after the chosen tokens."""
        return max(min(self.drafts, self.room - len(tokens)), 0)


@dataclass(frozen=True)
class Rules:
    """How one sequence's tokens are chosen."""

    params: TokenSampling
    seed: int
    """Seed of its random numbers: that of the parameters, or one drawn for it."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end it."""


@dataclass(frozen=True)
class Plan:
    """One step. `rules` has those of sequences that appear for the first time, `ended` the sequences to forget."""

    parts: tuple[Part, ...]
    copies: tuple[tuple[int, int], ...] = ()
    """Blocks to copy before anything is read, (from, to)."""
    rules: tuple[tuple[int, Rules], ...] = ()
    ended: tuple[int, ...] = ()
    moves: tuple[tuple[int, int], ...] = ()
    """Keys and values of the backbone to move before anything else, slots (from, to): as if all were read before any is
    written."""

    @property
    def tokens(self) -> int:
        """Tokens that the backbone reads."""
        return sum(len(part.tokens) for part in self.parts)

    @property
    def size(self) -> int:
        """Positions that the backbone and the recycle module read. The module may have long been left out."""
        module = (part.known - part.module_start for part in self.parts if part.module_start)
        return self.tokens + sum(module)


@dataclass(frozen=True)
class Chosen:
    """What a step chose for one sequence that samples."""

    sequence: int
    tokens: tuple[int, ...]
    """The accepted drafts and one token of the full model."""
    drafts: tuple[int, ...] = ()
    """Drafts of the recycle module for what follows."""
    confidences: tuple[float, ...] = ()
    """Probability that each draft is accepted if its parent is, by the module's confidence layer or the draft head; in chains
    without such a layer, that of the likeliest token."""
    logprobs: Logprobs = ()
    """For each token, if asked for: its log probability, and the most likely tokens with theirs."""
    scored: Logprobs = ()
    """The same for the part's targets. A chunk inside a prompt has these, and no tokens."""
    parents: tuple[int, ...] = ()
    """Parents of the drafts, see tree.py; empty for a chain."""
    calls: int = 0
    """Calls of the recycle module for the drafts: their depth."""


Outcome = tuple[Chosen, ...]
"""What a step chose, in the order of the plan's parts, for those that sample or have targets."""


def encode_plan(plan: Plan) -> list[int]:
    """A plan as integers, for the other ranks."""
    rules = json.dumps([(number, asdict(rule)) for number, rule in plan.rules]).encode() if plan.rules else b""
    numbers = [len(plan.parts), len(plan.moves), len(plan.copies), len(plan.ended), len(rules)]
    for part in plan.parts:
        flags = (part.judged, int(part.samples), part.module_start, part.drafts, part.room, part.prompt_tokens)
        sizes = (len(part.tokens), len(part.blocks), len(part.targets), len(part.parents), part.width, part.floor)
        numbers += [*sizes, part.sequence, part.start, *flags]
        numbers += [*part.tokens, *part.blocks, *part.targets, *part.parents]
    return [*numbers, *chain.from_iterable((*plan.moves, *plan.copies)), *plan.ended, *rules]


def decode_plan(numbers: Sequence[int]) -> Plan:
    """The plan that `encode_plan` made these integers of."""
    source = iter(numbers)

    def take(count: int) -> tuple[int, ...]:
        return tuple(islice(source, count))

    count, moves, copies, ended, length = take(5)
    parts = []
    for _ in range(count):
        tokens, blocks, targets, parents, width, floor = take(6)
        sequence, start, judged, samples, module_start, drafts, room, prompt = take(8)
        read, numbers_after = take(tokens), (module_start, drafts, room, prompt)
        lists = (take(blocks), take(targets), take(parents))
        parts.append(Part(sequence, start, read, judged, bool(samples), *numbers_after, *lists, width, floor))

    def pairs(number: int) -> tuple[tuple[int, int], ...]:
        flat = take(2 * number)
        return tuple(zip(flat[::2], flat[1::2], strict=True))

    moved, copied, over = pairs(moves), pairs(copies), take(ended)
    records = json.loads(bytes(take(length))) if length else []
    return Plan(tuple(parts), copied, tuple(map(_rules, records)), over, moved)


def _rules(record: tuple[int, dict[str, Any]]) -> tuple[int, Rules]:
    number, fields = record
    params = TokenSampling(**fields["params"])  # turns lists into tuples
    return number, Rules(params, fields["seed"], tuple(fields["end_ids"]))
