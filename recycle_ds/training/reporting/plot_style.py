"""One look for every figure: colours, sizes and how a figure is saved. No display is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_ds.config.atomic_files import publish, temporary_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


@contextmanager
def two_panels(path: Path, title: str, subtitle: str) -> Iterator[tuple[Axes, Axes]]:
    """Two empty panels under a heading, to be drawn on; then the figure, 11 x 4.4 inches, is written to `path`.

    The suffix chooses the format (png without one). The file appears whole or not at all.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.4))
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.15, 1]})
        figure.set_layout_engine("constrained", rect=(0.01, 0.02, 0.98, 0.81), wspace=0.06)
        figure.text(0.02, 0.945, title, fontsize=14, fontweight="bold", va="center")
        figure.text(0.02, 0.88, subtitle, fontsize=9.5, color=MUTED, va="center")
        yield left, right
        try:
            figure.savefig(temporary, dpi=160, format=path.suffix.lstrip(".") or "png")
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
