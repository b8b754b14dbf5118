"""The scheduler alone, with an invented runner: memory, fairness, prefixes, copies, the plan's encoding."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.inference.engine.blocks import BlockPool, OutOfBlocks
from recycle_ds.inference.engine.plan import Chosen, Outcome, Plan, Rules, decode_plan, encode_plan
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
    """Runs a scheduler with invented outcomes. Checks every plan against the memory that was written before."""

    def __init__(self, blocks: int, batch: int, chunk: int = 8, ways: int = 1, seed: int = 0) -> None:
        self.scheduler = Scheduler(BlockPool(blocks, SIZE), batch, chunk=chunk, ways=ways)
        self.draw = random.Random(seed)
        self.written: dict[int, int] = {}
        """Token by slot."""
        self.moved = 0
        self.under_way: list[Plan] = []
        self.plans: list[Plan] = []

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
            done = self.scheduler.apply(plan, invent(plan, self.draw))
        self.scheduler.check()
        return done

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
            tokens = by_number[part.sequence].tokens
            for at in range(part.start):
                assert self.written[part.blocks[at // SIZE] * SIZE + at % SIZE] == tokens[at], (
                    "a position was overwritten"
                )
            for at, token in enumerate(part.tokens, start=part.start):
                self.written[part.blocks[at // SIZE] * SIZE + at % SIZE] = token
            assert part.known == len(tokens) or not part.samples
            last = part.start + len(part.tokens) + part.samples + (part.drafts if part.samples else 0)
            longest = len(tokens) + by_number[part.sequence].stopping.remaining
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


@given(
    seed=st.integers(0, 10_000),
    blocks=st.integers(10, 30),
    batch=st.integers(1, 6),
    chunk=st.integers(1, 20),
    ways=st.integers(1, 3),
    count=st.integers(1, 14),
)
def test_every_request_ends_and_no_block_is_lost(
    seed: int, blocks: int, batch: int, chunk: int, ways: int, count: int
) -> None:
    """Prevents a leaked block, one used twice, a position overwritten by another sequence, and a request that never
    ends."""
    check_random_requests(seed, blocks, batch, chunk, ways, count)


@pytest.mark.parametrize("case", [(712054, 23, 6, 4, 2, 11), (705728, 13, 5, 6, 3, 11)])
def test_cases_that_once_failed(case: tuple[int, int, int, int, int, int]) -> None:
    """Prevents a block that is registered twice because the block before it was evicted and read again, and an answer that
    shares a prompt that was given up and is being read again."""
    check_random_requests(*case)


def check_random_requests(seed: int, blocks: int, batch: int, chunk: int, ways: int, count: int) -> None:
    """Runs random requests, forks and cancellations until all have ended."""
    draw = random.Random(seed)
    machine = Machine(blocks, batch, chunk, ways, seed)
    added: list[Sequence] = []
    for number in range(count):
        mode = draw.choice(["autoregressive", "verified", "alternate"])
        prompt = [draw.randrange(2) for _ in range(draw.randint(1, 16))]
        drafts = draw.choice([None, 0, 1, 3]) if mode == "verified" else draw.choice([1, 2])
        source = draw.choice(added) if added and draw.random() < 0.3 else None
        if source is not None:
            prompt, mode = source.tokens[: source.prompt_tokens], source.mode
        new_tokens = draw.randint(1, 16)
        one = sequence(
            number,
            prompt,
            new_tokens,
            mode,
            drafts=drafts,
            priority=draw.randint(0, 2),
            fork_of=source,
            ends=draw.random() < 0.4,
        )
        machine.scheduler.add(one)
        added.append(one)
        for _ in range(draw.randint(0, 3)):
            machine.step()
        if draw.random() < 0.2:
            machine.scheduler.cancel(draw.choice(added))
    machine.run()
    assert machine.scheduler.pool.free == blocks and not machine.scheduler.tables.take_copies()
    for one in added:
        new = one.tokens[one.prompt_tokens :]
        assert one.cancelled or len(new) == one.params.max_new_tokens or (one.rules.end_ids and new[-1] == 4)


@pytest.mark.parametrize("ways", [1, 2])
def test_accepted_drafts_are_moved_before_they_are_read(ways: int) -> None:
    """Prevents a property test whose trees are always accepted along their main path: there would be no moves."""
    machine = Machine(60, 4, ways=ways)
    for number in range(40):
        machine.scheduler.add(sequence(number, [number % 2] * 3, 30, "verified"))
    machine.run()
    assert machine.moved > 10
    assert any(part.parents for plan in machine.plans for part in plan.parts)


def test_drafts_do_not_take_memory_from_others() -> None:
    """Prevents the preemption of a sequence for drafts of another one, and a sequence that waits for ever for the memory of
    its drafts."""
    machine = Machine(8, 2, chunk=32)
    for number in range(2):
        machine.scheduler.add(sequence(number, [number] * 7, 9, "verified"))
    machine.run()
    assert machine.scheduler.preemptions == 0 and any(part.judged for plan in machine.plans for part in plan.parts)


def test_the_state_can_be_compared() -> None:
    """Prevents a scheduler whose state cannot be seen, so that an error in it cannot be reproduced."""
    states = []
    for _ in range(2):
        machine = Machine(20, 2)
        for number in range(3):
            machine.scheduler.add(sequence(number, [1, 2, 3, number]))
        machine.step()
        states.append(machine.scheduler.state())
    assert states[0] == states[1]
    assert [one["number"] for one in states[0]["running"]] == [0, 1]  # type: ignore[attr-defined]
    assert [one["number"] for one in states[0]["waiting"]] == [2]  # type: ignore[attr-defined]


def test_prompts_do_not_hold_up_decoding() -> None:
    """Prevents a long prompt from stopping the sequences that decode: each step has all of them, and a chunk of prompts."""
    machine = Machine(200, 8, chunk=6)
    decoding = [sequence(number, [number], 60) for number in range(3)]
    for one in decoding:
        machine.scheduler.add(one)
    machine.step()
    for number in range(3, 6):
        machine.scheduler.add(sequence(number, [number] * 50, 2))
    start = len(machine.plans)
    while any(one.number >= 3 for one in (*machine.scheduler.running, *machine.scheduler.waiting)):
        machine.step()
    for plan in machine.plans[start:]:
        assert {0, 1, 2} <= {part.sequence for part in plan.parts}
        assert sum(len(part.tokens) for part in plan.parts if part.sequence >= 3 and part.start < 50) <= 6
    assert len(machine.plans) - start <= 3 * 50 // 6 + 8, "and decoding does not hold up prompts"


def test_no_request_waits_for_ever() -> None:
    """Prevents a request of low priority from starving while ones of high priority keep coming."""
    machine = Machine(6, 1)
    low = sequence(0, [1, 2], 3)
    machine.scheduler.add(sequence(1, [1], 3, priority=2))
    machine.step()
    machine.scheduler.add(low)
    number = 2
    while low.ended_at is None:
        if sum(one.priority == 2 for one in machine.scheduler.waiting) < 2:
            machine.scheduler.add(sequence(number, [1], 3, priority=2))
            number += 1
        machine.step()
        assert machine.scheduler.step < 3 * 256 + 50
    assert machine.scheduler.step > 256, "priorities mean something"


def test_a_higher_priority_takes_memory_from_a_lower_one() -> None:
    """Prevents an urgent request from waiting behind others, and preempted ones from losing tokens."""
    machine = Machine(6, 4)
    low = sequence(0, [1] * 8, 12)
    machine.scheduler.add(low)
    for _ in range(6):
        machine.step()
    had = list(low.tokens)
    urgent = sequence(1, [2] * 12, 4, priority=3)
    machine.scheduler.add(urgent)
    machine.step()
    assert urgent in machine.scheduler.running and low in machine.scheduler.waiting
    machine.run()
    assert low.tokens[: len(had)] == had and low.preemptions == 1 and urgent.preemptions == 0
    assert urgent.ended_at is not None and low.ended_at is not None and urgent.ended_at < low.ended_at


def test_nothing_is_preempted_in_vain() -> None:
    """Prevents a sequence from losing its place for one that still cannot run, because an equal one holds the memory."""
    machine = Machine(9, 4, chunk=32)
    equal, low = sequence(0, [1] * 16, 8, priority=3), sequence(1, [2] * 4, 6)
    for one in (equal, low):
        machine.scheduler.add(one)
    machine.step()
    machine.step()
    large = sequence(2, [3] * 20, 4, priority=3)
    machine.scheduler.add(large)
    while low.ended_at is None:
        machine.step()
    assert low.preemptions == 0 and large.first_token_at is None, "there was never room for it"
    machine.run()
    assert large.ended_at is not None


def test_a_shared_prefix_is_read_once() -> None:
    """Prevents a prompt's beginning from being computed again, or the module's entries of it from being left out."""
    machine = Machine(40, 4, chunk=64)
    prefix = [1, 2, 3, 4, 0, 1, 2, 3, 3, 2]
    machine.scheduler.add(sequence(0, prefix, 4, "verified", drafts=2))
    machine.run()
    later = sequence(1, [*prefix, 4, 4], 4, "verified", drafts=2)
    machine.scheduler.add(later)
    machine.step()
    (part,) = machine.plans[-1].parts
    assert part.start == 8, "two full blocks"
    assert part.module_start == 8, "and the module's entries of both"
    machine.run()
    assert machine.scheduler.reused_tokens == 8


def test_answers_to_one_prompt_share_it_until_they_write() -> None:
    """Prevents n answers from reading the prompt n times, and one of them from writing into the others' block."""
    machine = Machine(40, 4, chunk=64)
    first = sequence(0, [1, 2, 3, 4, 0, 1], 5)
    forks = [sequence(number, [1, 2, 3, 4, 0, 1], 5, fork_of=first) for number in (1, 2)]
    for one in (first, *forks):
        machine.scheduler.add(one)
    machine.step()
    assert [part.sequence for part in machine.plans[-1].parts] == [0], "the others wait for the prompt"
    machine.step()
    parts = {part.sequence: part for part in machine.plans[-1].parts}
    assert {parts[number].start for number in (1, 2)} == {5}, "only the last token of the prompt is read again"
    assert len({parts[number].blocks[0] for number in (0, 1, 2)}) == 1, "the full block is shared"
    assert len({parts[number].blocks[1] for number in (0, 1, 2)}) == 3, "the block that is written is not"
    assert len(machine.plans[-1].copies) == 2
    machine.run()


def test_blocks_are_adjacent_where_possible() -> None:
    """Prevents a single stream from being copied for attention, because its blocks are scattered."""
    pool = BlockPool(12, SIZE)
    taken = [pool.allocate()]
    for _ in range(4):
        taken.append(pool.allocate(taken[-1]))
    assert taken == list(range(taken[0], taken[0] + 5))
    pool.release(taken)
    with pytest.raises(OutOfBlocks):
        for _ in range(13):
            pool.allocate()


@pytest.mark.parametrize(
    "change",
    [
        lambda pool, table: pool.release(table),
        lambda pool, table: pool.share(table[0]),
        lambda pool, table: table.append(table[0]),
        lambda pool, table: table.pop(),
    ],
)
def test_the_check_finds_wrong_books(change: Callable[[BlockPool, list[int]], object]) -> None:
    """Prevents the property test from passing because the check cannot fail."""
    pool = BlockPool(8, SIZE)
    table = [pool.allocate(), pool.allocate()]
    pool.check([table])
    change(pool, table)
    with pytest.raises(AssertionError):
        pool.check([table])
