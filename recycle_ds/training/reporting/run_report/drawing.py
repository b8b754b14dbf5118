"""Draws a plot with matplotlib as SVG to be placed inside HTML: its colours are the page's, so it follows light and dark."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from recycle_ds.training.reporting.run_report.panels import Panel, Series
from recycle_ds.training.reporting.run_report.texts import tick

COLOURS = 8
"""Colours `--curve-0`, `--curve-1`, ... of the page; further curves have them again, with dashes."""
DASHES = ("solid", (0, (4, 2)), (0, (1, 1.5)))
"""Of style // COLOURS."""
# Points of 1/72 inch, which are the units of the SVG: about pixels at the width that the page gives a plot.
_WIDTH, _HEIGHT = 400.0, 215.0
_LEFT, _RIGHT, _BOTTOM, _TOP = 50.0, 12.0, 26.0, 14.0
_FONT = 11.0
# Colours that stand for the page's: matplotlib must be given colours it knows.
_INK, _MUTED, _GRID, _BAD = "#0000f1", "#0000f2", "#0000f3", "#0000f4"
_VARIABLES = {_INK: "--ink", _MUTED: "--soft", _GRID: "--line", _BAD: "--bad"}
_VARIABLES |= {f"#0000e{number}": f"--curve-{number}" for number in range(COLOURS)}
_STYLE: dict[str, Any] = {
    "font.size": _FONT,
    "svg.fonttype": "none",
    "path.simplify": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.pad": 5,
}


@dataclass(frozen=True)
class Drawing:
    """A plot as SVG without ids, styles or addresses of its own. left, right: ends of its axis, as fractions of the width."""

    svg: str
    left: float
    right: float
    bottom: float
    """Of the axis, as fractions of the height."""
    top: float
    y_limits: tuple[float, float]


def draw(panel: Panel, number: int) -> Drawing:
    """Draws a panel. number: of the panel on its page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"panel {number}"}):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
        FigureCanvasSVG(figure)
        left, right = _LEFT / _WIDTH, 1 - _RIGHT / _WIDTH
        bottom, top = _BOTTOM / _HEIGHT, 1 - _TOP / _HEIGHT
        axes = figure.add_axes((left, bottom, right - left, top - bottom))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for series in panel.series:
            _curve(axes, series)
        _scales(axes, panel)
        for mark in panel.marks:
            colour = _BAD if mark.style is None else _colour(mark.style)
            if mark.resume:
                colour = _MUTED if mark.style is None else colour
                axes.axvline(mark.step, color=colour, linewidth=1, linestyle=(0, (2, 2)), gid="mark-resume")
            else:
                axes.plot(
                    [mark.step], [1.0], "x", color=colour, markersize=6, markeredgewidth=1.8, clip_on=False,
                    transform=axes.get_xaxis_transform(), zorder=5, gid="mark-anomaly",
                )  # fmt: skip
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        low, high = axes.get_ylim()
    return Drawing(_clean(text.getvalue()), left, right, bottom, top, (float(low), float(high)))


def _curve(axes: Any, series: Series) -> None:
    colour, line = _colour(series.style), DASHES[series.style // COLOURS % len(DASHES)]
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if series.points or len(series.steps) == 1 else {}
    faint = {"alpha": 0.3, "linewidth": 1.0} if series.mean is not None else {"linewidth": 1.8, "linestyle": line}
    axes.plot(series.steps, series.values, color=colour, gid="curve", clip_on=False, **faint, **marker)
    if series.mean is not None:
        axes.plot(*series.mean, color=colour, linewidth=1.8, linestyle=line, clip_on=False, gid="mean")
    if series.dots is not None:
        axes.plot(*series.dots, "o", color=colour, markersize=4.5, zorder=4, clip_on=False, gid="dots")


def _scales(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xlim(*panel.limits)
    axes.grid(axis="y", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        _widen_if_flat(axes, panel)
    unit = panel.unit
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, unit)))


def _widen_if_flat(axes: Any, panel: Panel) -> None:
    """A range for a constant: otherwise the axis would magnify rounding."""
    shown = np.concatenate([part for series in panel.series for part in _drawn(series)])
    finite = shown[np.isfinite(shown)]
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-3 * abs(high):
        margin = 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


def _drawn(series: Series) -> list[Any]:
    return [series.values] if series.dots is None else [series.values, series.dots[1]]


def _colour(style: int) -> str:
    return f"#0000e{style % COLOURS}"


def _clean(svg: str) -> str:
    """The svg element alone, with the page's colours and fonts, short numbers, and no address or name of a style."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"#0000[ef]\d", lambda match: f"var({_VARIABLES[match.group()]})", svg)
    svg = re.sub(r"font-family: [^;]*; |(?: transform=\"rotate\(-0 [\d. ]*\)\")", "", svg)
    svg = re.sub(r'\bd="[^"]*"', lambda match: re.sub(r"\d+\.\d{3,}", _two_decimals, match.group()), svg)
    svg = re.sub(r' id="(curve|mean|dots|mark-resume|mark-anomaly)"', r' class="\1"', svg)
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match.group() if match.group(1) in used else "", svg)
    svg = svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    return re.sub(r"\s*\n\s*", " ", svg)


def _two_decimals(match: re.Match[str]) -> str:
    return f"{float(match.group()):.2f}"
