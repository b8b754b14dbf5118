"""The tables of a report: results, layout and versions, settings. All cells are text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

from recycle_ds.training.reporting.run_report.metrics import Curves
from recycle_ds.training.reporting.run_report.runs import Run
from recycle_ds.training.reporting.run_report.texts import (
    NONE,
    bounded,
    decimals,
    duration,
    gib,
    integer,
    loss_text,
    moment,
    number_range,
    own_text,
    percent,
    plain,
)
from recycle_ds.training.reporting.sessions import RUNNING

MAX_SETTINGS = 1000
"""Settings in the table at most."""
_LAYOUT = {
    "world_size": "ranks",
    "tensor": "tensor parallel",
    "pipeline": "pipeline stages",
    "data": "data parallel",
    "sequence": "sequence parallel",
    "ulysses": "Ulysses",
    "zero_stage": "ZeRO stage",
    "dtype": "dtype",
}


@dataclass(frozen=True)
class Row:
    """A fact of all runs."""

    name: str
    cells: tuple[str, ...]
    """One for each run."""
    differs: bool = False
    """Whether to highlight the row: it belongs to what a run was given, and the runs are not alike."""


def results(runs: Sequence[Run]) -> list[Row]:
    """How far the runs have come, and with what result."""
    facts: dict[str, Callable[[Run], str]] = {
        "state": state,
        "step": lambda run: f"{integer(run.metrics.last_step)} of {integer(_steps(run))}",
        "tokens": lambda run: integer(run.metrics.steps.last("tokens")),
        "backbone loss, last": lambda run: loss_text(run.metrics.steps.last("backbone_loss")),
        "recycle loss by depth, last": lambda run: _by_depth(run.metrics.steps, "recycle_loss", loss_text),
        "validation loss, last": lambda run: loss_text(run.metrics.evaluations.last("eval_loss")),
        "validation loss, lowest": lowest_validation,
        "acceptance by draft, last": lambda run: _by_depth(run.metrics.evaluations, "eval_acceptance", percent),
        "tokens per full call, last": lambda run: decimals(
            run.metrics.evaluations.last("eval_tokens_per_full_call"), 2
        ),
        "tokens per second, median": lambda run: integer(_median(run.metrics.steps, "tokens_per_second")),
        "MFU, median": lambda run: percent(_median(run.metrics.steps, "mfu")),
        "memory, peak": lambda run: gib(max(run.metrics.steps.finite("memory_gib"), default=None)),
        "restarts": restarts,
        "checkpoints written": lambda run: integer(run.summary.get("checkpoints")),
        "training waited for checkpoints": lambda run: duration(run.summary.get("saving_seconds")),
        "checkpoints on disk": on_disk,
        "anomalies": anomalies,
    }
    rows = (Row(name, tuple(bounded(fact(run)) for run in runs)) for name, fact in facts.items())
    return [row for row in rows if any(cell not in (NONE, "") for cell in row.cells)]


def layout(runs: Sequence[Run]) -> list[Row]:
    """What the runs run on: layout, parameters, dtype, versions."""
    rows = [
        _compared("parameters", [integer(run.layout.get("parameters")) for run in runs]),
        _compared("parameters per rank", [number_range(run.layout.get("parameters_per_rank")) for run in runs]),
    ]
    for key, name in _LAYOUT.items():
        rows.append(_compared(name, [plain(run.layout.get(key)) for run in runs]))
    origins = [run.checkpoints.provenance for run in runs]
    for key in ("recycle_ds", "git", "python"):
        rows.append(_compared(key, [plain(origin.get(key)) for origin in origins]))
    packages = [origin.get("packages") for origin in origins]
    tables = [table if isinstance(table, dict) else {} for table in packages]
    for name in dict.fromkeys(str(name) for table in tables for name in table):
        rows.append(_compared(name, [plain(table.get(name)) for table in tables]))
    commands = [origin.get("command") for origin in origins]
    shown = [" ".join(own_text(word) for word in words) if isinstance(words, list) else NONE for words in commands]
    rows.append(_compared("command", shown))
    return [row for row in rows if any(cell != NONE for cell in row.cells)]


def settings(runs: Sequence[Run]) -> list[Row]:
    """The settings of config.yaml by dotted key, those that differ between runs first."""
    trees = [dict(islice(_flat(run.config), MAX_SETTINGS)) for run in runs]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))[:MAX_SETTINGS]
    rows = []
    for key in keys:
        cells = tuple(tree.get(key, NONE) for tree in trees)
        known = {cell for cell, tree in zip(cells, trees, strict=True) if tree}
        rows.append(Row(key, cells, len(known) > 1))
    return sorted(rows, key=lambda row: not row.differs)


def state(run: Run) -> str:
    """How the run ended, or that it is running; the error of a start that failed, unless the run is finished."""
    found = run.summary.get("state")
    if run.error and found not in ("finished", "stop_at"):
        return run.error
    if found == RUNNING:
        return f"running, or killed; last line {moment(run.metrics.steps.last('time'))} UTC"
    return plain(found)


def restarts(run: Run) -> str:
    """The number of restarts, and how many after a kill."""
    number, killed = run.summary.get("restarts"), run.summary.get("killed")
    return f"{number} ({killed} after a kill)" if number else integer(number)


def anomalies(run: Run) -> str:
    """Anomalies with their numbers, over all sessions."""
    counts = run.summary.get("anomalies")
    if not isinstance(counts, dict):
        return NONE
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def on_disk(run: Run) -> str:
    """The steps of the published checkpoints, oldest first."""
    steps = sorted(run.checkpoints.steps)
    shown = ", ".join(f"{step:,}" for step in steps[-6:])
    return (f"{len(steps) - 6} older, " if len(steps) > 6 else "") + shown or NONE


def lowest_validation(run: Run) -> str:
    """The lowest validation loss, and its step."""
    curves = run.metrics.evaluations
    # a run whose evaluations have no such loss has steps alone
    pairs = zip(curves.values.get("eval_loss", ()), curves.steps, strict=False)
    finite = [(loss, step) for loss, step in pairs if math.isfinite(loss)]
    return f"{min(finite)[0]:.4f} at step {min(finite)[1]:,}" if finite else NONE


def _compared(name: str, cells: list[str]) -> Row:
    """A row that differs if two runs that have recorded it do."""
    return Row(name, tuple(bounded(cell) for cell in cells), len(set(cells) - {NONE}) > 1)


def _flat(tree: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict) and tree and depth < 8:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    else:
        yield prefix, plain(tree)


def _steps(run: Run) -> Any:
    training = run.config.get("training")
    return run.summary.get("steps") or (training.get("steps") if isinstance(training, dict) else None)


def _median(curves: Curves, name: str) -> float | None:
    return median(curves.finite(name)) if curves.finite(name) else None


def _by_depth(curves: Curves, key: str, text: Callable[[Any], str]) -> str:
    return "  ".join(text(curves.last(name)) for name in curves.within(key)) or NONE
