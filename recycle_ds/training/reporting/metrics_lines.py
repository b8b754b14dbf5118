"""A line of metrics.jsonl as a record, also of a file that is being written or was damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_MAX_STEP = 2**53


def parse_record(line: str) -> dict[str, Any] | None:
    """The record of a line, which has an integer `step` of at least 0; None if the line has no end or is no such record."""
    if not line.endswith("\n"):  # the run was killed while it wrote, or is still writing
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: also an integer with more digits than Python parses
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < _MAX_STEP else None


def scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record by tag; those of a list are numbered from 1, such as `recycle_loss/2`."""
    for key, value in metrics.items():
        if key in ("step", "time"):
            continue
        values = value if isinstance(value, list) else [value]
        for depth, number in enumerate(values, start=1):
            if isinstance(number, int | float):
                yield f"{key}/{depth}" if isinstance(value, list) else key, number
