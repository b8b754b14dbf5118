"""A scheduler with an invented runner: outcomes at random, and a check of every plan against the memory written before."""

from __future__ import annotations

import random
from typing import NamedTuple

from recycle_ds.inference.engine.blocks import BlockPool
from recycle_ds.inference.engine.distributed import decode_outcome, encode_outcome
from recycle_ds.inference.engine.plan import PENDING, Chosen, Outcome, Plan, Rules, decode_plan, encode_plan
from recycle_ds.inference.engine.scheduler import Scheduler
from recycle_ds.inference.engine.sequence import Sequence
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.speculation.stopping import StopCondition
from recycle_ds.inference.speculation.tree import child, depths, parents_of, without_chain

SIZE = 4


def sequence(
    number: int, prompt: list[int], new_tokens: int = 8, mode: str = "autoregressive", **rest: object
) -> Sequence:
    params = SamplingParams(max_new_tokens=new_tokens, draft_tokens=rest.pop("drafts", None))  # type: ignore[arg-type]
    ends = (4,) if rest.pop("ends", False) else ()
    rules = Rules(params.token_sampling, 0, ends)
    stopping = StopCondition(frozenset(ends), new_tokens, "length")
    return Sequence(number, list(prompt), len(prompt), mode, params, rules, stopping, **rest)  # type: ignore[arg-type]


def invent(plan: Plan, draw: random.Random) -> Outcome:
    """What a runner might choose: some drafts are accepted, and tokens are a function of their position."""
    outcome = []
    for part in plan.parts:
        if not part.samples:
            continue
        drafts, parents = part.judged_ids, parents_of(part.judged, part.parents)
        path: list[int] = []
        while (
            below := [k for k in range(1, part.judged + 1) if parents[k - 1] == (path or [0])[-1]]
        ) and draw.randrange(4):
            path.append(draw.choice(below))
        below_ids = {drafts[k - 1] for k in below}
        # eight ids can all be drafts, of the tree and of what the text repeats
        token = draw.choice([one for one in range(9) if one not in below_ids])
        tokens = (*(drafts[k - 1] for k in path), token)
        made = part.drafts_after(tokens) if part.module_start else 0
        new = random_tree(made, draw) if part.width else DraftTree(tuple(draw.choices(range(8), k=made)), (), made)
        confidences = tuple(draw.choice([0.1, 0.5, 0.9]) for _ in new.ids)
        outcome.append(
            Chosen(part.sequence, tokens, new.ids, confidences, parents=without_chain(new.parents), calls=new.depth)
        )
    return tuple(outcome)


class DraftTree(NamedTuple):
    ids: tuple[int, ...]
    parents: tuple[int, ...]
    depth: int


def random_tree(most: int, draw: random.Random) -> DraftTree:
    """A tree at most so deep, in which children have different ids."""
    ids: list[int] = []
    parents: list[int] = []
    for _ in range(draw.randint(0, 12) if most else 0):
        parent = draw.choice([k for k, depth in enumerate((0, *depths(parents))) if depth < most])
        token = draw.randrange(8)
        if child(ids, parents, parent, token) is None:
            ids.append(token)
            parents.append(parent)
    return DraftTree(tuple(ids), tuple(parents), max(depths(parents), default=0))


class Machine:
    """Runs a scheduler with invented outcomes. Checks every plan against the memory that was written before.

    ahead: whether plans are made before the outcome of the one under way is known, where that can be done."""

    def __init__(
        self, blocks: int, batch: int, chunk: int = 8, ways: int = 1, seed: int = 0, *, ahead: bool = False
    ) -> None:
        self.scheduler = Scheduler(BlockPool(blocks, SIZE), batch, chunk=chunk, ways=ways)
        self.draw = random.Random(seed)
        self.scheduler.piece = chunk // 3 if seed % 2 else None
        self.written: dict[int, int] = {}
        """Token by slot."""
        self.moved = 0
        self.under_way: list[Plan] = []
        self.plans: list[Plan] = []
        self.ahead = ahead
        self.made_ahead = 0

    def step(self) -> list[Sequence]:
        """Starts as many plans as may be under way, and ends the oldest one."""
        while len(self.under_way) < self.scheduler.ways and (plan := self.scheduler.next()) is not None:
            assert decode_plan(encode_plan(plan)) == plan
            self.write(plan)
            self.under_way.append(plan)
            self.plans.append(plan)
        done = []
        if self.under_way:
            plan = self.under_way.pop(0)
            following = self.scheduler.following(plan) if self.ahead else None
            if following is not None:
                assert decode_plan(encode_plan(following)) == following
                self.write(following)
                self.under_way.append(following)
                self.plans.append(following)
                self.made_ahead += 1
            outcome = invent(plan, self.draw)
            assert decode_outcome(encode_outcome(outcome)) == outcome
            done = self.scheduler.apply(plan, outcome)
            self.settle()
        self.scheduler.check()
        return done

    def settle(self) -> None:
        """Replaces what stood for tokens that were not known yet. Of sequences that have ended since it stays."""
        by_number = {one.number: one for one in self.scheduler.running}
        for part in (part for plan in self.under_way for part in plan.parts if part.tokens == (PENDING,)):
            if part.sequence in by_number:
                slot = part.blocks[part.start // SIZE] * SIZE + part.start % SIZE
                self.written[slot] = by_number[part.sequence].tokens[part.start]

    def write(self, plan: Plan) -> None:
        """Copies and writes tokens as a runner would, and asserts that every earlier position has its own token."""
        by_number = {one.number: one for one in self.scheduler.running}
        self.moved += len(plan.moves)
        read = [self.written.get(source, -1) for source, _ in plan.moves]
        for (_, target), token in zip(plan.moves, read, strict=True):
            self.written[target] = token
        assert len({target for _, target in plan.moves}) == len(plan.moves), "two accepted drafts in one place"
        for source, target in plan.copies:
            for offset in range(SIZE):
                self.written[target * SIZE + offset] = self.written.get(source * SIZE + offset, -1)
        numbers = [part.sequence for part in plan.parts]
        assert len(set(numbers)) == len(numbers)
        for part in plan.parts:
            tokens = list(by_number[part.sequence].tokens)
            longest = len(tokens) + by_number[part.sequence].stopping.remaining
            if part.tokens == (PENDING,):
                tokens.append(PENDING)
            for at in range(part.start):
                assert self.written[part.blocks[at // SIZE] * SIZE + at % SIZE] == tokens[at], (
                    "a position was overwritten"
                )
            for at, token in enumerate(part.tokens, start=part.start):
                self.written[part.blocks[at // SIZE] * SIZE + at % SIZE] = token
            assert part.known == len(tokens) or not part.samples
            last = part.start + len(part.tokens) + part.samples + (part.drafts if part.samples else 0)
            if not part.width:
                assert len(part.blocks) * SIZE >= min(last, longest), "no room for what the step writes"
            elif part.samples:
                assert len(part.blocks) * SIZE >= part.start + len(part.tokens), "no room for a draft"
                path = max(depths(parents_of(part.judged, part.parents)), default=0)
                beams = max(part.drafts - 1, 0) * part.width
                assert len(part.blocks) * SIZE >= part.known + path + 1 + beams, "no room for the next tree"
                assert part.known + path < longest, "a draft after the last token that is allowed"

    def run(self, limit: int = 4000) -> None:
        """Runs until all sequences have ended."""
        for _ in range(limit):
            if not self.scheduler.waiting and not self.scheduler.running and not self.under_way:
                return
            self.step()
        raise AssertionError(f"sequences do not end: {self.scheduler.state()}")
