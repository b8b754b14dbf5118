"""The scheduler alone, with an invented runner: memory, fairness, prefixes, copies, the plan's encoding."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.inference.engine.blocks import BlockPool, OutOfBlocks
from recycle_ds.inference.engine.plan import PENDING
from recycle_ds.inference.engine.sequence import Sequence
from tests.unit.inference.engine.invented_runner import SIZE, Machine, sequence


@given(
    seed=st.integers(0, 10_000),
    blocks=st.integers(10, 30),
    batch=st.integers(1, 6),
    chunk=st.integers(1, 20),
    ways=st.integers(1, 3),
    count=st.integers(1, 14),
    ahead=st.booleans(),
)
def test_every_request_ends_and_no_block_is_lost(
    seed: int, blocks: int, batch: int, chunk: int, ways: int, count: int, ahead: bool
) -> None:
    """Prevents a leaked block, one used twice, a position overwritten by another sequence, and a request that never
    ends, also where a plan is made before the outcome of the one before it is known."""
    check_random_requests(seed, blocks, batch, chunk, 1 if ahead else ways, count, ahead=ahead)


@pytest.mark.parametrize("case", [(712054, 23, 6, 4, 2, 11), (705728, 13, 5, 6, 3, 11)])
def test_cases_that_once_failed(case: tuple[int, int, int, int, int, int]) -> None:
    """Prevents a block that is registered twice because the block before it was evicted and read again, and an answer that
    shares a prompt that was given up and is being read again."""
    check_random_requests(*case)


def check_random_requests(
    seed: int, blocks: int, batch: int, chunk: int, ways: int, count: int, *, ahead: bool = False
) -> Machine:
    """Runs random requests, forks and cancellations until all have ended."""
    draw = random.Random(seed)
    machine = Machine(blocks, batch, chunk, ways, seed, ahead=ahead)
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
    return machine


def test_plans_are_made_ahead() -> None:
    """Prevents a property test in which no plan is made before the outcome of the one before it is known."""
    made = [check_random_requests(seed, 20, 4, 8, 1, 14, ahead=True) for seed in range(20)]
    assert sum(one.made_ahead for one in made) > 100
    for machine in made:
        ahead = [part for plan in machine.plans for part in plan.parts if PENDING in part.tokens]
        assert all(part.is_plain and len(part.tokens) == 1 for part in ahead)


@pytest.mark.parametrize("ways", [1, 2])
def test_accepted_drafts_are_moved_before_they_are_read(ways: int) -> None:
    """Prevents a property test whose trees are always accepted along their main path: there would be no moves."""
    machine = Machine(60, 4, ways=ways)
    for number in range(80):
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


def test_prompts_come_in_pieces_beside_others() -> None:
    """Prevents a prompt that takes those that decode out of their graphs, and small pieces where none decodes."""
    machine = Machine(200, 8, chunk=12)
    machine.scheduler.piece = 3
    first = sequence(0, [1] * 20, 60)
    machine.scheduler.add(first)
    machine.step()
    assert [len(part.tokens) for part in machine.plans[-1].parts] == [12], "nobody decodes beside it"
    machine.step()
    for number in range(1, 4):
        machine.scheduler.add(sequence(number, [number + 4] * 10, 20))
    machine.step()
    assert [(part.sequence, len(part.tokens)) for part in machine.plans[-1].parts] == [(0, 1), (1, 3), (2, 3)]
    machine.run()


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


def test_nothing_is_preempted_for_too_few_blocks() -> None:
    """Prevents the same where `alternate` needs room for what it recycles, which belongs to its text."""
    machine = Machine(5, 4, chunk=32)
    low, equal = sequence(0, [2] * 4, 4), sequence(1, [1], 3, priority=3)
    for one in (low, equal):
        machine.scheduler.add(one)
    machine.step()
    assert machine.scheduler.pool.free == 2
    large = sequence(2, [3] * 15, 4, "alternate", priority=3, drafts=2)
    machine.scheduler.add(large)
    machine.step()
    assert low.preemptions == 0 and large in machine.scheduler.waiting
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
