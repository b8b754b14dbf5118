"""What each row is, and who writes which rows."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.self_text.groups import Choice, Demand, Group
from recycle_ds.inference.self_text.prompts import Prompt, PromptSet
from recycle_ds.inference.self_text.rows import TRAIN, VALIDATION, RowPlan, RowPlanner
from recycle_ds.inference.self_text.settings import SelfTextSettings, parse_held_out, parse_temperatures
from recycle_ds.inference.self_text.takeover import Takeover

PROMPTS = tuple(Prompt(f"f:{n}", "prompt", f"question {n}") for n in range(12))


def planned(count: int, **settings: Any) -> list[RowPlan]:
    """The first rows to train on, of 10 prompts."""
    planner = RowPlanner(SelfTextSettings(tokens=1, **settings), PromptSet(PROMPTS[:10], PROMPTS[10:]))
    return [planner.row(TRAIN, number) for number in range(count)]


def test_prompts_are_used_once_before_one_is_used_again() -> None:
    """Prevents text about the first prompts of a file only, and equal greedy rows."""
    rows = planned(400, free=0.25)
    assert sum(row.prompt is None for row in rows) == 100
    from_file = [row for row in rows if row.prompt is not None]
    for start in range(0, 300, 10):
        assert len({row.prompt for row in from_file[start : start + 10]}) == 10
    assert [row.prompt for row in from_file[:10]] != list(PROMPTS[:10]), "a file may be sorted"
    greedy = Counter(row.prompt for row in from_file if row.temperature == 0)
    assert set(greedy.values()) == {1} and len(greedy) == 10
    assert len({(row.prompt, row.temperature) for row in from_file[:30]}) == 30, "another temperature every time"
    assert Counter(row.temperature for row in rows if row.prompt is None).keys() == {0.0, 0.6, 1.0}
    assert rows == planned(400, free=0.25)
    assert len({row.seed_of(turn) for row in rows for turn in range(3)}) == 1200


def test_prompts_with_one_opening_are_answered_greedily_once() -> None:
    """Prevents equal greedy answers to one question that a file has with several follow-ups."""
    prompts = tuple(Prompt("f", "prompt", f"question {n}", (f"then {then}",)) for n in range(6) for then in range(3))
    for temperatures, free in (((0.0, 0.6, 1.0), 0.25), ((0.0,), 0.5), ((0.0, 1.0), 0.0)):
        planner = RowPlanner(SelfTextSettings(tokens=1, temperatures=temperatures, free=free), PromptSet(prompts))
        rows = [planner.row(TRAIN, number) for number in range(300)]
        greedy = [row.prompt.opening for row in rows if row.prompt is not None and row.temperature == 0]
        assert sorted(greedy) == sorted({prompt.opening for prompt in prompts})
    only = RowPlanner(SelfTextSettings(tokens=1, temperatures=(0.0,), free=0.0), PromptSet(prompts))
    assert only.rows(TRAIN) == 6
    found = [only.row(TRAIN, number).prompt for number in range(6)]
    assert len({prompt.opening for prompt in found if prompt is not None}) == 6


def test_a_temperature_that_is_listed_twice_is_used_twice_as_often() -> None:
    """Prevents weights of temperatures that have no effect."""
    counts = Counter(row.temperature for row in planned(3000, temperatures=(0.5, 0.5, 1.0), free=0.5))
    assert counts == {0.5: 2000, 1.0: 1000}


def test_greedy_rows_of_a_file_are_limited() -> None:
    """Prevents the same greedy rows again and again, instead of fewer tokens or rows of the model's own."""
    settings = SelfTextSettings(tokens=1, temperatures=(0.0,), free=0.0)
    assert RowPlanner(settings, PromptSet(PROMPTS)).rows(TRAIN) == 12
    rows = planned(60, temperatures=(0.0,), free=0.5)
    assert sum(row.prompt is not None for row in rows) == 10
    assert RowPlanner(SelfTextSettings(tokens=1), PromptSet(PROMPTS)).rows(TRAIN) is None


def test_held_out_rows_are_greedy_and_have_prompts_of_their_own() -> None:
    """Prevents an evaluation on sampled text, or on prompts of the training text."""
    settings = SelfTextSettings(tokens=1, held_out=3, free=0.34)
    planner = RowPlanner(settings, PromptSet(PROMPTS[:10], PROMPTS[10:]))
    rows = [planner.row(VALIDATION, number) for number in range(3)]
    assert [row.temperature for row in rows] == [0.0] * 3
    assert {row.prompt for row in rows} == {None, *PROMPTS[10:]}
    assert rows[0].seed_of(0) != planner.row(TRAIN, 0).seed_of(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "alternate"}, "mode=alternate"),
        ({"mode": "fast"}, "mode='fast'"),
        ({"temperatures": (0.0, -1.0)}, "temperatures=-1.0"),
        ({"temperatures": (float("nan"),)}, "temperatures=nan"),
        ({"prompt_temperature": 0.0}, "prompt_temperature=0"),
        ({"free": 1.5}, "free=1.5"),
        ({"tokens": 0}, "tokens=0"),
        ({"row_tokens": 8}, "row_tokens=8"),
        ({"min_tokens": 640}, "min_tokens=640"),
        ({"ngram": 1}, "ngram=1"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"dtype": "fp16"}, "dtype='fp16'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    """Prevents hours of work with settings that have no meaning."""
    with pytest.raises(DecodingError, match=message):
        SelfTextSettings(**{"tokens": 100, **changes})


def test_lists_and_shares_of_the_command_line() -> None:
    """Prevents a share that is taken for a number of rows, and a traceback for a typing error."""
    assert parse_temperatures("0,0.6, 1") == (0.0, 0.6, 1.0)
    assert [parse_held_out(text, 64_000, 640) for text in ("0", "64", "0.02", "0.0301")] == [0, 64, 2, 4]
    for call in (
        lambda: parse_temperatures("0;1"),
        lambda: parse_held_out("1.5", 1, 1),
        lambda: parse_held_out("-3", 1, 1),
        lambda: parse_held_out("x", 1, 1),
    ):
        with pytest.raises(DecodingError, match="such as"):
            call()


def test_groups_suit_the_amount_of_text() -> None:
    """Prevents groups of thousands of tokens for a small text, and small ones that leave a batch half empty."""
    assert SelfTextSettings(tokens=10_000_000).group_rows == 128
    assert SelfTextSettings(tokens=640 * 40, max_batch=32).group_rows == 32
    assert SelfTextSettings(tokens=100, max_batch=32).group_rows == 1


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("lost", [None, 0])
def test_every_group_that_is_needed_is_written(processes: int, lost: int | None) -> None:
    """Prevents text that is missing or too short, whatever the sizes of groups and the order in which processes finish,
    also if one of them is lost at the start; and work far beyond what is needed."""
    draw = random.Random(processes)
    for _ in range(40):
        sizes = [draw.choice([0, 30, 60, 100]) for _ in range(200)]
        sizes[0] = 50
        demand = Demand(held_out=3, tokens=1500, largest=100, patience=50)
        finished: dict[Group, int] = {}
        under_way: dict[int, Group | None] = {}
        while True:
            for rank in range(processes):
                if rank not in under_way and (rank != lost or processes == 1):
                    chosen = demand.next_group(finished, rank, processes)
                    under_way[rank] = chosen and chosen.group
            running = [rank for rank, group in under_way.items() if group is not None]
            if not running:
                break
            rank = draw.choice(running)
            group = under_way.pop(rank)
            assert group is not None
            finished[group] = sizes[group.number]
            under_way = {rank: group for rank, group in under_way.items() if group is not None}
        count = next(n for n in range(200) if sum(sizes[:n]) >= 1500)
        written = {group.number for group in finished if group.side == TRAIN}
        assert written >= set(range(count)) and len(written) <= count + 4 * processes
        assert {group.number for group in finished if group.side == VALIDATION} == {0, 1, 2}


def test_text_without_tokens_ends_the_job() -> None:
    """Prevents a job that never ends because every row is left out."""
    demand = Demand(held_out=0, tokens=100, largest=50, patience=2)
    assert demand.next_group({Group(TRAIN, 0): 0}, 0, 1) == Choice(Group(TRAIN, 1), own=True)
    with pytest.raises(DecodingError, match="--min-tokens"):
        demand.next_group({Group(TRAIN, 0): 0, Group(TRAIN, 1): 0}, 0, 1)
    limited = Demand(held_out=0, tokens=1000, largest=50, limit=2)
    assert limited.next_group({Group(TRAIN, 0): 10, Group(TRAIN, 1): 10}, 0, 1) is None


def test_a_text_that_hardly_grows_ends_the_job() -> None:
    """Prevents a job of months, because one row in a thousand is kept, and one that ends at a single bad group."""
    demand = Demand(held_out=0, tokens=10**7, largest=128 * 641, patience=1, least=0.01 * 128 * 32)
    poor = {Group(TRAIN, number): 35 for number in range(4)}
    with pytest.raises(DecodingError, match=r"4 groups have only 140 tokens.*--min-tokens"):
        demand.next_group(poor, 0, 1)
    assert demand.next_group({Group(TRAIN, 0): 4000, Group(TRAIN, 1): 0}, 0, 1) == Choice(Group(TRAIN, 2), own=True)


def test_the_next_group_of_very_many_is_found() -> None:
    """Prevents lists of all groups that may be needed, which fill the memory of every process after every group."""
    demand = Demand(held_out=2, tokens=10**12, largest=100)
    finished = {Group(TRAIN, number): 1 for number in range(50)}
    assert demand.needed(finished) == 10**12
    assert demand.next_group(finished, 1, 2) == Choice(Group(VALIDATION, 1), own=True)
    finished |= {Group(VALIDATION, number): 1 for number in range(2)}
    assert demand.next_group(finished, 1, 2) == Choice(Group(TRAIN, 51), own=True)


def test_processes_without_a_group_are_not_its_own() -> None:
    """Prevents processes beyond the number of groups that take one of another process for their own and write it too."""
    demand = Demand(held_out=0, tokens=300, largest=100)
    found = [demand.next_group({}, rank, 5) for rank in range(5)]
    assert [(one.group.number, one.own) for one in found if one] == [
        (0, True),
        (1, True),
        (2, True),
        (0, False),
        (1, False),
    ]


def test_a_group_of_another_process_is_written_after_its_usual_time() -> None:
    """Prevents cores that write what another process is about to finish, and a job that waits for a lost process for ever."""
    now = 0.0
    idle = Takeover(lambda: now)
    assert not idle.is_due(0)
    now = 599.0
    assert not idle.is_due(0)
    now = 600.0
    assert idle.is_due(0), "no group has been finished at all"
    now = 0.0
    other = Takeover(lambda: now)
    assert not other.is_due(3)
    now = 50.0
    assert not other.is_due(4), "another process has needed 50 s"
    now = 100.0
    assert other.is_due(4)
    other.wrote(40.0, own=False, published=True)
    assert other.is_due(5), "its process is lost, and so are its other groups"
    other.wrote(10.0, own=False, published=False)
    assert not other.is_due(6), "it was not lost"
    now = 140.0
    assert other.is_due(6) and 0 < other.pause <= 2
    other.wrote(30.0, own=True, published=True)
    assert not other.is_due(7)
