"""One look for every figure: colours, sizes and how a figure is saved. No display is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
BACKBONE = "#334e68"
MODE_COLOURS = {"autoregressive": "#9fb3c8", "alternate": "#e9a23b", "verified": "#17807a"}
DEPTH_COLOURS = ("#17807a", "#e9a23b", "#b44d5e", "#6b5ca5", "#4a90c2", "#8c6d46")
"""By recycle depth, or draft position; repeated when there are more."""

_STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
}


def two_panels(title: str, subtitle: str) -> tuple[Figure, Axes, Axes]:
    """An empty figure, 11 x 4.4 inches, with a heading over two panels."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.4))
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.15, 1]})
    figure.subplots_adjust(left=0.07, right=0.975, top=0.77, bottom=0.13, wspace=0.2)
    figure.text(0.02, 0.95, title, fontsize=14, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 0.885, subtitle, fontsize=9.5, color=MUTED, va="center")
    return figure, left, right


def save(figure: Figure, path: Path) -> None:
    """Writes the figure, in the format of the suffix; it appears whole or not at all."""
    import matplotlib

    from recycle_ds.data.atomic import publish, temporary_name

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with matplotlib.rc_context(_STYLE):
            figure.savefig(temporary, dpi=160, format=path.suffix.lstrip(".") or "png")
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
