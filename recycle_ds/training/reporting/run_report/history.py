"""The tables of a run's starts and events, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recycle_ds.training.reporting.run_report.runs import Run
from recycle_ds.training.reporting.run_report.texts import duration, integer, is_number, moment, plain

MAX_ROWS = 200
"""Rows of a table: the first and the last ones; between them a row says how many were left out."""


@dataclass(frozen=True)
class Part:
    """A part of a run's time, from its first start to its last sign of life."""

    name: str
    kind: str
    """Its class in the page's style sheet."""
    seconds: float
    share: float

    @property
    def text(self) -> str:
        """Its length, and its share of the time."""
        return f"{duration(self.seconds)}, {100 * self.share:.1f} %"


def sessions(run: Run) -> list[tuple[str, ...]]:
    """A row for each start: time, steps, end, job, checkpoints, time that training waited for them, lost and idle time."""
    rows = [
        (
            moment(one.get("begun")),
            f"{integer(one.get('first_step'))} to {integer(one.get('last_step'))}",
            plain(one.get("ended")),
            plain(one.get("job")),
            integer(one.get("checkpoints")),
            *(duration(one.get(key)) for key in ("saving_seconds", "lost_seconds", "idle_seconds")),
        )
        for one in _starts(run)
    ]
    return _limited(rows, 8)


def events(run: Run) -> list[tuple[str, ...]]:
    """A row for each event of metrics.jsonl: step, time, name, details."""
    rows: list[tuple[str, ...]] = []
    for event in run.metrics.events:
        details = ", ".join(f"{key}: {plain(value)}" for key, value in event.details.items() if key != "time")
        rows.append((integer(event.step), moment(event.details.get("time")), plain(event.name), plain(details or None)))
    return _limited(rows, 4)


def time_by_part(run: Run) -> list[Part]:
    """Where the time went, by the summary; empty if the summary does not say."""
    starts = [one["begun"] for one in _starts(run) if is_number(one.get("begun"))]
    ends = [one["until"] for one in _starts(run) if is_number(one.get("until"))]
    ends += run.metrics.steps.finite("time")[-1:]  # of a run that has no end yet
    total = max(ends, default=0.0) - min(starts, default=0.0)
    if not starts or total <= 0:
        return []
    parts = [
        ("waiting for checkpoints", "saving", "saving_seconds"),
        ("repeated work and start-up after restarts", "lost", "lost_seconds"),
        ("idle between two starts", "idle", "idle_seconds"),
    ]
    seconds = {key: run.summary.get(key) for _, _, key in parts}
    found = [(name, kind, value) for name, kind, key in parts if is_number(value := seconds[key]) and value > 0]
    # repeated work may include its own checkpoints
    training = max(0.0, total - sum(value for *_, value in found))
    whole = training + sum(value for *_, value in found)
    named = [("training, evaluation and the first start-up", "training", training), *found]
    return [Part(name, kind, value, value / whole) for name, kind, value in named]


def _starts(run: Run) -> list[dict[str, Any]]:
    found = run.summary.get("sessions")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _limited(rows: list[tuple[str, ...]], columns: int) -> list[tuple[str, ...]]:
    if len(rows) <= MAX_ROWS:
        return rows
    half = MAX_ROWS // 2
    left_out = (f"{len(rows) - 2 * half:,} left out", *[""] * (columns - 1))
    return [*rows[:half], left_out, *rows[-half:]]
