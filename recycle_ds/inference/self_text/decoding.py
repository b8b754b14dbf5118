"""Writes a group of rows with the engine, a full batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.sequence import OnTokens, Sequence
from recycle_ds.inference.self_text.row import Row, Writer
from recycle_ds.inference.self_text.rows import RowPlan


def write_rows(
    engine: DecodingEngine,
    plans: Iterable[RowPlan],
    writer: Writer,
    stop: Callable[[], bool],
    progress: Callable[[int], None],
) -> list[dict[str, Any]] | None:
    """Writes rows, `max_batch` at once. Returns their records in order, None if `stop`, called before each step, is true.

    What a group's steps compute depends on its rows alone: it begins with an empty cache, and a turn follows the one
    before at once. So a group that is written again, after a kill or by another process, is the same to the bit, in
    bf16 too (but for `verified`, whose drafts follow measured costs). progress: called with the number of new tokens.
    """
    engine.scheduler.forget_prefixes()
    waiting = iter(plans)
    running: dict[int, tuple[Row, Sequence]] = {}
    finished: list[Row] = []
    looping: set[int] = set()
    exhausted = False

    def follow(number: int, row: Row) -> OnTokens:
        def take(ids: list[int], _: list[bool]) -> None:
            progress(len(ids))
            if row.take(ids):
                looping.add(number)

        return take

    def ask(number: int, row: Row) -> None:
        """Queues the row's next request, or takes it as finished."""
        if row.end is not None:
            finished.append(row)
            return
        mode = writer.settings.mode
        (sequence,) = engine.add(row.tokens, row.params, mode, on_tokens=follow(number, row))
        running[number] = row, sequence

    try:
        while True:
            while not exhausted and len(running) < engine.scheduler.max_batch:
                plan = next(waiting, None)
                if plan is None:
                    exhausted = True
                else:
                    ask(plan.number, Row(plan, writer))
            if not running:
                return [row.record() for row in sorted(finished, key=lambda row: row.plan.number)]
            if stop():
                return None
            engine.step()
            for number, (row, sequence) in list(running.items()):
                if number in looping and sequence.ended_at is None:
                    engine.cancel(sequence)
                if sequence.ended_at is not None:
                    del running[number]
                    row.end_turn()
                    ask(number, row)
            looping.clear()
    finally:
        for _, sequence in running.values():
            engine.cancel(sequence)
        engine.settle()
