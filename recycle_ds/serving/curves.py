"""Curves of a run for the page: losses and acceptance from metrics.jsonl, thinned to a few hundred points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recycle_ds.training.reporting.metrics_lines import parse_record

METRICS = "metrics.jsonl"
MAX_POINTS = 500
"""Points of a curve at most: more than a screen's width shows nothing new."""

Curve = list[float | None]


def read_curves(path: Path, max_points: int = MAX_POINTS) -> dict[str, Any]:
    """The curves of a metrics.jsonl, also of one that a run is appending to: lines that are no complete record are skipped.

    Returns `steps`, `loss` and `backbone_loss` (one value per point), `recycle_loss` (one curve per depth), `eval`
    (`steps`, `loss`, `acceptance`: one curve per draft position) and `resumed` (the steps at which a run was resumed).
    Numbers that are missing or not finite are None. Raises OSError when the file cannot be read.
    """
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    resumed: list[int] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for record in filter(None, map(parse_record, lines)):
            step = record["step"]
            if record.get("event") == "resume":
                _drop_after(steps, step)
                _drop_after(evaluations, step)
                resumed.append(step)
            elif "eval_loss" in record:
                _drop_after(evaluations, step - 1)
                evaluations.append({key: record.get(key) for key in ("step", "eval_loss", "eval_acceptance")})
            elif "backbone_loss" in record:
                _drop_after(steps, step - 1)
                steps.append({key: record.get(key) for key in ("step", "loss", "backbone_loss", "recycle_loss")})
    last = max((records[-1]["step"] for records in (steps, evaluations) if records), default=0)
    groups, kept = _groups(steps, max_points), _groups(evaluations, max_points)
    return {
        "steps": [group[-1]["step"] for group in groups],
        "loss": [_mean(record["loss"] for record in group) for group in groups],
        "backbone_loss": [_mean(record["backbone_loss"] for record in group) for group in groups],
        "recycle_loss": _by_position(groups, "recycle_loss"),
        "eval": {
            "steps": [group[-1]["step"] for group in kept],
            "loss": [_mean(record["eval_loss"] for record in group) for group in kept],
            "acceptance": _by_position(kept, "eval_acceptance"),
        },
        "resumed": sorted({step for step in resumed if 0 < step < last}),
    }


def _drop_after(records: list[dict[str, Any]], step: int) -> None:
    """A run that was set back logs its steps again: the later lines count."""
    while records and records[-1]["step"] > step:
        records.pop()


def _groups(records: list[dict[str, Any]], number: int) -> list[list[dict[str, Any]]]:
    """Neighbours together, `number` groups at most, each of which becomes a point."""
    if len(records) <= number:
        return [[record] for record in records]
    bounds = [len(records) * i // number for i in range(number + 1)]
    return [records[start:end] for start, end in itertools.pairwise(bounds)]


def _by_position(groups: list[list[dict[str, Any]]], key: str) -> list[Curve]:
    """One curve for each place in the records' lists (a depth or a draft position)."""
    width = max((len(_list(record[key])) for group in groups for record in group), default=0)
    return [[_mean(_at(_list(record[key]), place) for record in group) for group in groups] for place in range(width)]


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _at(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else None


def _mean(values: Iterable[Any]) -> float | None:
    finite = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
