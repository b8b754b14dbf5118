"""The figure of a run: losses and acceptance over its steps."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_ds.training.errors import TrainingError
from recycle_ds.training.reporting.plot_style import BACKBONE, DEPTH_COLOURS, GRID, MUTED, two_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Window of the running mean, as a share of the run's logged steps.
_SMOOTHING = 0.03


@dataclass(frozen=True)
class _Run:
    """Lines of metrics.jsonl: logged steps, and evaluations."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def plot_loss(metrics_jsonl: Path, path: Path) -> None:
    """Draws backbone loss, recycle losses by depth and evaluations over the steps, and acceptance by depth beside them.

    Raises TrainingError when the file cannot be read or has no logged step.
    """
    run = _read(metrics_jsonl)
    last = run.steps[-1]
    tokens = f", {last['tokens'] / 1e6:.1f} M tokens" if "tokens" in last else ""
    with two_panels(path, "Pretraining", f"{metrics_jsonl.parent}  ·  {last['step']} steps{tokens}") as (left, right):
        _losses(left, run)
        _acceptance(right, run)


def _read(path: Path) -> _Run:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from None
    steps, evaluations = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):  # the run was killed while it wrote, or is still writing
                break
            raise TrainingError(f"{path}:{number}: not valid JSON; remove the line to plot the rest") from None
        if "eval_loss" in record:
            evaluations.append(record)
        elif "backbone_loss" in record:
            steps.append(record)
    if not steps:
        raise TrainingError(f"{path}: no step has been logged yet; set training.log_every below the number of steps")
    return _Run(steps, evaluations)


def _losses(axes: Axes, run: _Run) -> None:
    _curve(axes, run.steps, [record["backbone_loss"] for record in run.steps], BACKBONE, "backbone")
    _points(axes, run.evaluations, [record["eval_loss"] for record in run.evaluations], BACKBONE)
    depths = max((len(record.get("recycle_loss") or ()) for record in run.steps), default=0)
    for depth in range(depths):
        colour = DEPTH_COLOURS[depth % len(DEPTH_COLOURS)]
        _curve(axes, run.steps, _at(run.steps, "recycle_loss", depth), colour, f"recycle, depth {depth + 1}")
        _points(axes, run.evaluations, _at(run.evaluations, "eval_recycle_loss", depth), colour)
    if run.evaluations:
        axes.plot([], [], "o", color=MUTED, markersize=5, markeredgecolor="white", label="validation")
    axes.set_title("Loss (nats per token)")
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=GRID)
    axes.legend(fontsize=9)


def _acceptance(axes: Axes, run: _Run) -> None:
    axes.set_title("Drafts that the backbone agrees with (validation)")
    axes.set_xlabel("step")
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(axis="y", color=GRID)
    depths = max((len(record.get("eval_acceptance") or ()) for record in run.evaluations), default=0)
    if depths == 0:
        axes.text(0.5, 0.45, "no evaluation with a recycle module", transform=axes.transAxes, ha="center", color=MUTED)
        return
    steps = [record["step"] for record in run.evaluations]
    for depth in range(depths):
        colour = DEPTH_COLOURS[depth % len(DEPTH_COLOURS)]
        values = _at(run.evaluations, "eval_acceptance", depth)
        last = f", {values[-1]:.0%} at the end" if math.isfinite(values[-1]) else ""
        axes.plot(steps, values, "o-", color=colour, markersize=4.5, label=f"depth {depth + 1}{last}")
    axes.set_xlim(0, max(steps[-1], run.steps[-1]["step"]) * 1.1)
    axes.legend(fontsize=9, loc="lower right")


def _curve(axes: Axes, records: list[dict[str, Any]], values: list[float], colour: str, label: str) -> None:
    """The logged values, faint, and their running mean."""
    steps = [record["step"] for record in records]
    window = max(1, round(_SMOOTHING * len(values)))
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    smooth = [_mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    axes.plot(steps, smooth, color=colour, label=label)


def _points(axes: Axes, records: list[dict[str, Any]], values: list[float], colour: str) -> None:
    steps = [record["step"] for record in records]
    axes.plot(steps, values, "o", color=colour, markersize=6, markeredgecolor="white", zorder=3)


def _at(records: list[dict[str, Any]], key: str, depth: int) -> list[float]:
    """One depth of a list by depth; NaN, which is not drawn, where a record has none."""
    lists = [record.get(key) or () for record in records]
    return [values[depth] if depth < len(values) and values[depth] is not None else math.nan for values in lists]


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
