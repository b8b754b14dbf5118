"""The report as one HTML file: plots, tables, style and script, with nothing loaded from elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

import recycle_ds
from recycle_ds.training.reporting.run_report import facts, history
from recycle_ds.training.reporting.run_report.drawing import COLOURS, DASHES, Drawing, draw
from recycle_ds.training.reporting.run_report.panels import QUANTITIES, Panel, Series, panels
from recycle_ds.training.reporting.run_report.runs import Run
from recycle_ds.training.reporting.run_report.texts import NONE, encodable, reading
from recycle_ds.training.reporting.run_report.thinning import MAX_POINTS, SMOOTHING, Floats
from recycle_ds.training.reporting.run_report.writing import MARKER

# Significant digits of the values that the page's script shows.
_DIGITS = 6


@dataclass(frozen=True)
class Legend:
    """A curve's entry under its plot."""

    label: str
    swatch: str
    """Classes of the line beside the label."""
    last: str
    """Its last value."""


@dataclass(frozen=True)
class Plot:
    """A plot on the page."""

    panel: Panel
    drawing: Drawing
    legend: tuple[Legend, ...]
    description: str
    """In words, for readers who do not see it."""
    data: dict[str, Any]
    """The values behind it, as the script reads them."""


def render(runs: Sequence[Run]) -> str:
    """The report of the runs as HTML. All text of the runs' files is escaped."""
    folder = jinja2.PackageLoader("recycle_ds.training.reporting.run_report", "assets")
    environment = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["asset"] = lambda name: folder.get_source(environment, name)[0]
    plots = [_plot(panel, draw(panel, number)) for number, panel in enumerate(panels(runs))]
    page = environment.get_template("report.html.jinja").render(
        marker=MARKER,
        runs=[_described(run, style) for style, run in enumerate(runs)],
        several=len(runs) > 1,
        plots=plots,
        missing=_missing(runs),
        results=facts.results(runs),
        layout=facts.layout(runs),
        settings=facts.settings(runs),
        thinned=any(series.thinned for plot in plots for series in plot.panel.series),
        smoothed=any(series.mean is not None for plot in plots for series in plot.panel.series),
        resumes=any(mark.resume for plot in plots for mark in plot.panel.marks),
        anomalies=any(not mark.resume for plot in plots for mark in plot.panel.marks),
        max_points=MAX_POINTS,
        window=f"{100 * SMOOTHING:g} %",
        data=[plot.data for plot in plots],
        version=recycle_ds.__version__,
        written=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    )
    return encodable(page)


def _described(run: Run, style: int) -> dict[str, Any]:
    return {
        "label": run.label,
        "path": str(run.path),
        "swatch": _swatch(style),
        "state": facts.state(run),
        "notes": run.notes,
        "parts": history.time_by_part(run),
        "sessions": history.sessions(run),
        "events": history.events(run),
    }


def _missing(runs: Sequence[Run]) -> list[str]:
    """Titles of the quantities that no run has recorded."""
    return [
        quantity.title
        for quantity in QUANTITIES
        if not any(
            run.metrics.evaluations.finite(name) if quantity.evaluated else run.metrics.steps.finite(name)
            for run in runs
            for key in quantity.keys
            for name in (run.metrics.evaluations if quantity.evaluated else run.metrics.steps).within(key)
        )
    ]


def _plot(panel: Panel, drawing: Drawing) -> Plot:
    legend = tuple(Legend(one.label, _swatch(one.style), _last(one, panel.unit)) for one in panel.series)
    words = "; ".join(f"{entry.label} {entry.last}" for entry in legend)
    data = {
        "unit": panel.unit,
        "limits": panel.limits,
        "left": round(drawing.left, 5),
        "right": round(drawing.right, 5),
        "series": [_points(series.steps, series.values) for series in panel.series],
        "marks": [[mark.step, mark.names] for mark in panel.marks],
    }
    return Plot(panel, drawing, legend, f"{panel.title} by step; last values: {words}", data)


def _swatch(style: int) -> str:
    return f"swatch colour-{style % COLOURS} dash-{style // COLOURS % len(DASHES)}"


def _last(series: Series, unit: str) -> str:
    values = series.values.tolist()
    last = next((value for value in reversed(values) if math.isfinite(value)), None)
    return NONE if last is None else reading(last, unit)


def _points(steps: Floats, values: Floats) -> dict[str, list[Any]]:
    return {
        "steps": [int(step) for step in steps.tolist()],
        "values": [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()],
    }
