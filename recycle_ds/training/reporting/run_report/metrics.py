"""metrics.jsonl of a run, also of one that is still writing it: curves by name, and events."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recycle_ds.training.reporting.metrics_lines import parse_record

RESUME = "resume"
MAX_DEPTHS = 16
"""Entries of a list by depth, and parts of a record by part, that become curves."""
# The greatest fp32 number: a greater one was not measured, and an axis to it would overflow.
_MAX_VALUE = 3.5e38
# Numbers, lists by depth and objects by part of a record. Other keys, and what an older or newer release writes, are skipped.
_STEP_KEYS = (
    *("loss", "backbone_loss", "recycle_loss", "confidence_loss", "grad_norm", "grad_norm_by_part", "learning_rate"),
    *("tokens", "tokens_per_second", "mfu", "memory_gib", "time", "rank_seconds", "seconds_by_part"),
)
_EVALUATION_KEYS = ("eval_loss", "eval_recycle_loss", "eval_acceptance", "eval_tokens_per_full_call")
# Keys of `rank_seconds` that are no seconds.
_NO_CURVES = ("slowest_rank",)


@dataclass(frozen=True)
class Event:
    """A line of metrics.jsonl about a resume or an anomaly."""

    name: str
    step: int
    details: dict[str, Any]
    """Its other keys, `time` included."""


class Curves:
    """Numbers by name over ascending steps; NaN where a record does not have them, or where they are no finite number."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, numbers: dict[str, float]) -> None:
        """Adds a record. A step that is not after the last one replaces it and all later ones: the run was set back."""
        self.drop_after(step - 1)
        for name in numbers:
            if name not in self.values:
                self.values[name] = array("d", [math.nan]) * len(self.steps)
        self.steps.append(step)
        for name, column in self.values.items():
            column.append(numbers.get(name, math.nan))

    def drop_after(self, step: int) -> None:
        """Drops the records after `step`."""
        keep = len(self.steps)
        while keep and self.steps[keep - 1] > step:
            keep -= 1
        del self.steps[keep:]
        for column in self.values.values():
            del column[keep:]

    def last(self, name: str) -> float | None:
        """The last finite value of a curve, None if there is none."""
        return next((value for value in reversed(self.values.get(name, ())) if math.isfinite(value)), None)

    def finite(self, name: str) -> list[float]:
        """All finite values of a curve."""
        return [value for value in self.values.get(name, ()) if math.isfinite(value)]

    def within(self, key: str) -> list[str]:
        """The names of the curves of a key: itself, `key/1`, `key/2` by depth, or `key/part`."""
        return [name for name in self.values if name.partition("/")[0] == key]


@dataclass
class Metrics:
    """What a metrics.jsonl contains."""

    steps: Curves = field(default_factory=Curves)
    """Logged steps."""
    evaluations: Curves = field(default_factory=Curves)
    events: list[Event] = field(default_factory=list)
    damaged: int = 0
    """Lines that are not a complete record."""
    incomplete: bool = False
    """Whether the last line has no end: the run is writing it, or was killed while it did."""

    @property
    def last_step(self) -> int:
        """The last logged or evaluated step, 0 if there is none."""
        return max((curves.steps[-1] for curves in (self.steps, self.evaluations) if len(curves)), default=0)

    @property
    def resumes(self) -> list[Event]:
        """Where the run was resumed."""
        return [event for event in self.events if event.name == RESUME]

    @property
    def anomalies(self) -> list[Event]:
        """All other events."""
        return [event for event in self.events if event.name != RESUME]


def read_metrics(path: Path) -> Metrics:
    """Reads a metrics.jsonl. Damaged lines are counted and skipped. Raises OSError if the file cannot be read."""
    found = Metrics()
    with path.open(encoding="utf-8", errors="replace") as lines:
        for record in _records(lines, found):
            step = record["step"]
            if isinstance(record.get("event"), str):
                if record["event"] == RESUME:
                    found.steps.drop_after(step)
                    found.evaluations.drop_after(step)
                details = {key: value for key, value in record.items() if key not in ("event", "step")}
                found.events.append(Event(record["event"], step, details))
            elif "eval_loss" in record:
                found.evaluations.append(step, _numbers(record, _EVALUATION_KEYS))
            elif "backbone_loss" in record:
                found.steps.append(step, _numbers(record, _STEP_KEYS))
    return found


def _records(lines: Iterable[str], found: Metrics) -> Iterator[dict[str, Any]]:
    for line in lines:
        record = parse_record(line)
        if record is not None:
            yield record
        elif line.endswith("\n"):
            found.damaged += 1
        else:
            found.incomplete = True


def _numbers(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, float]:
    """The record's numbers by curve name."""
    found = {}
    for key in keys:
        value = record.get(key)
        if isinstance(value, list):
            parts = [(str(depth), number) for depth, number in enumerate(value[:MAX_DEPTHS], start=1)]
        elif isinstance(value, dict):
            parts = [(part, number) for part, number in value.items() if part not in _NO_CURVES][:MAX_DEPTHS]
        else:
            parts = [("", value)]
        for part, number in parts:
            if isinstance(number, int | float) and not isinstance(number, bool):
                found[f"{key}/{part}" if part else key] = _finite(number)
    return found


def _finite(number: float) -> float:
    try:
        value = float(number)
    except OverflowError:  # an integer
        return math.nan
    return value if abs(value) <= _MAX_VALUE else math.nan
