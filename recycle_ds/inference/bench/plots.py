"""The plot of a decoding comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_ds.inference.bench.setting import described
from recycle_ds.training.reporting.plot_style import DEPTH_COLOURS, GRID, INK, MODE_COLOURS, MUTED, two_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_decoding(report: dict[str, Any], path: Path) -> None:
    """Plots tokens per second by mode and peer, with speedups, and acceptance by draft position and by kind of prompt, from a
    report of `run_bench`."""
    subtitle = f"{report['model']}  ·  {described(report, '  ·  ')}"
    with two_panels(path, "Decoding speed and draft acceptance", subtitle) as (left, right):
        _speeds(left, {**report["modes"], **report.get("peers", {})})
        _acceptance(right, report["modes"])


def _speeds(axes: Axes, modes: dict[str, Any]) -> None:
    speeds = [figures["tokens_per_second"] for figures in modes.values()]
    rows = range(len(modes))
    axes.barh(rows, speeds, height=0.62, color=[MODE_COLOURS.get(mode, MUTED) for mode in modes])
    axes.set_yticks(rows, list(modes))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, max(speeds) * 1.38)
    axes.grid(axis="x", color=GRID)
    for row, figures in zip(rows, modes.values(), strict=True):
        speed = figures["tokens_per_second"]
        above = 6 if len(modes) < 5 else 5
        axes.annotate(
            f"{figures['speedup']:.2f}x",
            (speed, row),
            (7, above),
            textcoords="offset points",
            va="center",
            weight="bold",
        )
        same = {True: ", identical", False: ", different text", None: ""}[figures["identical_to_autoregressive"]]
        # of another program, another text is no more than another rounding: its arithmetic says more
        detail = f"{speed:.0f} tok/s" + (f", {figures['dtype']}" if "version" in figures else same)
        axes.annotate(detail, (speed, row), (7, -8), textcoords="offset points", va="center", color=MUTED, fontsize=8.5)
    axes.set_title("Tokens per second, prefill excluded")


def _acceptance(axes: Axes, modes: dict[str, Any]) -> None:
    """Bars: acceptance given that all earlier drafts were accepted. Line: probability that all up to it are accepted."""
    acceptance = modes.get("verified", {}).get("acceptance", [])
    kinds = modes.get("verified", {}).get("kinds", {})
    axes.set_title("Acceptance by draft position (verified)")
    axes.set_ylim(0, 1.28 if kinds else 1.18)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(axis="y", color=GRID)
    if not acceptance:
        axes.set_xticks([])
        axes.text(0.5, 0.45, "no draft was verified", transform=axes.transAxes, ha="center", color=MUTED)
        return
    positions = range(1, len(acceptance) + 1)
    axes.bar(positions, acceptance, width=0.62, color=MODE_COLOURS["verified"], label="if all before it were accepted")
    kept, product = [], 1.0
    for rate in acceptance:
        product *= rate
        kept.append(product)
    axes.plot(positions, kept, color=INK, marker="o", markersize=4, label="it and all before it")
    for number, (kind, one) in enumerate(kinds.items()):
        rates = one["acceptance"]
        colour = DEPTH_COLOURS[(number + 1) % len(DEPTH_COLOURS)]
        axes.plot(range(1, len(rates) + 1), rates, "_", color=colour, markersize=13, markeredgewidth=2.4, label=kind)
    for position, rate in zip(positions, acceptance, strict=True):
        axes.annotate(
            f"{rate:.2f}", (position, rate), (0, 4), textcoords="offset points", ha="center", fontsize=9, color=INK
        )
    axes.set_xlim(0.4, max(len(acceptance), 3) + 0.6)
    axes.set_xticks(positions)
    axes.set_xlabel("draft position")
    size, columns = (7.5, 3) if kinds else (8.5, 2)
    axes.legend(loc="upper right", fontsize=size, ncols=columns, borderaxespad=0.1, handlelength=1.4)
