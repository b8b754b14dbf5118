"""Which plots a report has: of one run a plot with all its curves, of several runs a plot for each curve, to compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recycle_ds.training.reporting.run_report.metrics import Curves, Event, Metrics
from recycle_ds.training.reporting.run_report.runs import Run
from recycle_ds.training.reporting.run_report.thinning import Floats, smooth, thin

MAX_DOTS = 60
"""Evaluations that are drawn as dots at most."""
MAX_MARKS = 150
"""Marks of one kind in a plot at most; closer ones are drawn as one."""
# A loss that diverged; a gradient norm that varies, as it often does.
_DIVERGED, _VARIES = 1000.0, 30.0


@dataclass(frozen=True)
class Quantity:
    """Curves that share a plot. keys: of metrics.jsonl, each a number, a list by depth or an object by part."""

    title: str
    keys: tuple[str, ...]
    note: str = ""
    unit: str = ""
    """"%" for fractions."""
    evaluated: bool = False
    """Whether it is measured in evaluations, not in training steps."""
    smoothed: bool = False
    dots: tuple[str, ...] = ()
    """Keys of evaluations that are drawn into the same plot, one for each key."""
    logarithmic_from: float = math.inf
    """Ratio of the greatest to the least value from which the axis is logarithmic."""


QUANTITIES = (
    Quantity(
        "Loss", ("backbone_loss", "recycle_loss"), "nats per token",
        smoothed=True, dots=("eval_loss", "eval_recycle_loss"), logarithmic_from=_DIVERGED,
    ),
    Quantity("Validation loss", ("eval_loss", "eval_recycle_loss"), "cross entropy, nats per token", evaluated=True),
    Quantity(
        "Acceptance", ("eval_acceptance",), "of drafts whose predecessors were accepted; validation", "%", evaluated=True,
    ),
    Quantity("Tokens per full call", ("eval_tokens_per_full_call",), "validation", evaluated=True),
    Quantity("Total loss", ("loss",), "what is optimised: weighted sum", smoothed=True, logarithmic_from=_DIVERGED),
    Quantity("Confidence loss", ("confidence_loss",), "binary cross entropy", smoothed=True),
    Quantity("Learning rate", ("learning_rate",)),
    Quantity("Gradient norm", ("grad_norm",), "before clipping", smoothed=True, logarithmic_from=_VARIES),
    Quantity("Gradient norm by part", ("grad_norm_by_part",), "before clipping", smoothed=True, logarithmic_from=_VARIES),
    Quantity("Tokens per second", ("tokens_per_second",), smoothed=True),
    Quantity("MFU", ("mfu",), "model FLOPs utilisation", "%", smoothed=True),
    Quantity("Memory", ("memory_gib",), "GiB, peak of rank 0"),
    Quantity("Own work of the ranks", ("rank_seconds",), "seconds per step, data and forward passes", smoothed=True),
    Quantity("Time by part", ("seconds_by_part",), "seconds per step", smoothed=True),
)  # fmt: skip
_NAMES = {
    "backbone_loss": "backbone",
    "recycle_loss": "recycle, depth",
    "eval_loss": "backbone",
    "eval_recycle_loss": "recycle, depth",
    "eval_acceptance": "draft",
    "eval_tokens_per_full_call": "tokens per full call",
    "loss": "total",
    "confidence_loss": "depth",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "grad_norm_by_part": "",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "memory_gib": "memory",
    "rank_seconds": "",
    "seconds_by_part": "",
}


@dataclass(frozen=True)
class Series:
    """A curve of a plot, thinned. steps, values: [N], values not finite where nothing is drawn."""

    label: str
    style: int
    """Colour and dashes: of the curve if there is one run, else of the run."""
    steps: Floats
    values: Floats
    mean: tuple[Floats, Floats] | None
    """Its running mean, which is drawn above it."""
    dots: tuple[Floats, Floats] | None
    """Evaluations of the same quantity."""
    points: bool
    """Whether every point is marked: they are evaluations, and few."""
    thinned: bool
    """Whether points were left out."""


@dataclass(frozen=True)
class Mark:
    """Where a run was resumed, or had anomalies. names: of the events, with their number if there are several."""

    step: float
    style: int | None
    """Style of the run, None if there is only one."""
    resume: bool
    names: str


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    note: str
    unit: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...]
    limits: tuple[float, float]
    """First and last step of the axis."""
    logarithmic: bool


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The plots of a report that have something to show; all have the same range of steps."""
    last = max((run.metrics.last_step for run in runs), default=0)
    limits = (0.0, float(max(last, 1)))
    marks = tuple(mark for style, run in enumerate(runs) for mark in _marks(run.metrics, style, len(runs), limits[1]))
    found = []
    for quantity in QUANTITIES:
        if len(runs) == 1:
            groups = [(quantity.title, _of_one(runs[0], quantity))]
        else:
            groups = _of_several(runs, quantity)
        for title, series in groups:
            if series:
                log = _spread(series) > quantity.logarithmic_from
                found.append(
                    Panel(title, _note(quantity, series, log), quantity.unit, tuple(series), marks, limits, log)
                )
    return found


def _note(quantity: Quantity, series: Sequence[Series], logarithmic: bool) -> str:
    dots = any(one.dots is not None for one in series)
    parts = (quantity.note, "dots: validation" if dots else "", "logarithmic" if logarithmic else "")
    return "; ".join(part for part in parts if part)


def _of_one(run: Run, quantity: Quantity) -> list[Series]:
    """All curves of a quantity, each with its own colour."""
    curves = _curves(run, quantity)
    names = [(key, name) for key in quantity.keys for name in curves.within(key)]
    series: list[Series] = []
    for key, name in names:
        style = _style(key, name, len(series))
        series += _series(run, quantity, name, curve_label(name), style, _dots_of(run, quantity, key))
    return series


def _style(key: str, name: str, position: int) -> int:
    """A depth has the same colour in all plots of one run, and the backbone too."""
    depth = _depth(name)
    return position if depth is None or key == "backbone_loss" else depth


def _of_several(runs: Sequence[Run], quantity: Quantity) -> list[tuple[str, list[Series]]]:
    """A group for each curve of a quantity, with that curve of every run."""
    names = {
        name: key
        for key in quantity.keys
        for run in runs
        for name in sorted(_curves(run, quantity).within(key), key=_order)
    }
    groups = []
    for name, key in names.items():
        title = quantity.title if len(names) == 1 else f"{quantity.title}: {curve_label(name)}"
        series = []
        for style, run in enumerate(runs):
            series += _series(run, quantity, name, run.label, style, _dots_of(run, quantity, key))
        groups.append((title, series))
    return groups


def _order(name: str) -> tuple[int, str]:
    return (_depth(name) or 0, name.partition("/")[2])


def _depth(name: str) -> int | None:
    """The depth that a curve's name ends in. A part may have any name, also one of other digits than these or of thousands."""
    part = name.partition("/")[2]
    return int(part) if part.isascii() and part.isdecimal() and len(part) < 10 else None


def curve_label(name: str) -> str:
    """A curve's name for the reader: `recycle_loss/2` is "recycle, depth 2"."""
    key, _, part = name.partition("/")
    return f"{_NAMES[key]} {part}".strip()


def _curves(run: Run, quantity: Quantity) -> Curves:
    return run.metrics.evaluations if quantity.evaluated else run.metrics.steps


def _dots_of(run: Run, quantity: Quantity, key: str) -> str | None:
    """The key of the evaluations that belong into a curve's plot; None if they measure something else.

    Evaluations have the cross entropy over the complete vocabulary. A module may be trained for another objective.
    """
    recycle = run.config.get("recycle", {})
    if key == "recycle_loss" and (
        not run.config
        or not isinstance(recycle, dict)
        or recycle.get("objective", "cross_entropy") != "cross_entropy"
        or recycle.get("draft_vocabulary_in_training")
    ):
        return None
    return quantity.dots[quantity.keys.index(key)] if quantity.dots else None


def _series(run: Run, quantity: Quantity, name: str, label: str, style: int, dots: str | None) -> list[Series]:
    """The curve as a list of one; empty if the run has no finite value of it."""
    steps, values = _arrays(_curves(run, quantity), name)
    if not np.isfinite(values).any():
        return []
    evaluated = None
    if dots is not None:
        points = thin(*_arrays(run.metrics.evaluations, "/".join((dots, *name.split("/")[1:]))), MAX_DOTS)
        evaluated = points if np.isfinite(points[1]).any() else None
    kept = thin(steps, values)
    mean = smooth(steps, values) if quantity.smoothed else None
    thinned = len(kept[0]) < len(steps)
    marked = quantity.evaluated and len(steps) <= MAX_DOTS
    return [Series(label, style, *kept, mean, evaluated, marked, thinned)]


def _arrays(curves: Curves, name: str) -> tuple[Floats, Floats]:
    values = np.array(curves.values.get(name, ()), dtype=np.float64)
    steps = np.array(curves.steps if len(values) else (), dtype=np.float64)
    return steps, values


def _spread(series: Sequence[Series]) -> float:
    """The ratio of the greatest value to the least one; 0 if not all are positive."""
    finite = [value for one in series for value in one.values.tolist() if math.isfinite(value)]
    return max(finite) / min(finite) if finite and min(finite) > 0 else 0.0


def _marks(metrics: Metrics, style: int, number: int, last: float) -> list[Mark]:
    """The run's marks. Events that would be drawn at the same place are one mark."""
    resumes = [event for event in metrics.resumes if 0 < event.step < metrics.last_step]  # later steps exist
    found = []
    for resume, events in ((True, resumes), (False, metrics.anomalies)):
        places: dict[int, list[Event]] = {}
        for event in events:
            places.setdefault(round(MAX_MARKS * min(event.step, last) / last), []).append(event)
        for together in places.values():
            names = [event.name for event in together]
            counts = {name: names.count(name) for name in dict.fromkeys(names)}
            text = ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in counts.items())
            step = float(min(together[0].step, last))
            found.append(Mark(step, style if number > 1 else None, resume, text))
    return found
