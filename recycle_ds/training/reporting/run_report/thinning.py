"""Fewer points for a long run: the least and greatest value of every stretch stay."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 500
"""Points of a curve at most: about one for each pixel of a plot's width."""
SMOOTHING = 0.03
"""Window of the running mean, as a fraction of the logged steps."""
# Fewer points are drawn without a running mean.
_MIN_SMOOTHED = 100

Floats = NDArray[np.float64]


def thin(steps: Floats, values: Floats, max_points: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """At most `max_points` of the points [N], in order: the least and the greatest value of every stretch of equal length,
    and the first and the last point. Where a stretch has no finite value, one NaN stays and interrupts the curve."""
    if len(steps) <= max_points:
        return steps, values
    kept = {0, len(steps) - 1}
    bounds = np.linspace(0, len(steps), (max_points - 2) // 2 + 1).astype(int)
    for start, end in itertools.pairwise(bounds.tolist()):
        part = values[start:end]
        finite = np.isfinite(part)
        if finite.any():
            kept.add(int(start + np.argmin(np.where(finite, part, np.inf))))
            kept.add(int(start + np.argmax(np.where(finite, part, -np.inf))))
        else:
            kept.add(start)
    chosen = sorted(kept)
    return steps[chosen], values[chosen]


def smooth(steps: Floats, values: Floats, max_points: int = MAX_POINTS // 2) -> tuple[Floats, Floats] | None:
    """The mean of the finite values of the 3 % of the points around each, at `max_points` points at most; None if there are few
    points. At both ends the window is cut."""
    if len(values) < _MIN_SMOOTHED:
        return None
    reach = max(1, round(SMOOTHING * len(values) / 2))
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    position = np.arange(len(values))
    starts, ends = np.maximum(position - reach, 0), np.minimum(position + reach + 1, len(values))
    number = counts[ends] - counts[starts]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(number > 0, (sums[ends] - sums[starts]) / number, np.nan)
    chosen = np.unique(np.linspace(0, len(values) - 1, min(len(values), max_points)).round().astype(int))
    return steps[chosen], means[chosen]
