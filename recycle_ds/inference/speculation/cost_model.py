"""What calls of the model cost by their size: measured, interpolated and corrected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Cost model before anything is measured: each further token of a full call, and a module call, in full calls.
_NOMINAL_SLOPE, _NOMINAL_MODULE = 0.05, 0.1
# Weight of a new measurement in the correction of the cost model.
_CORRECTION = 0.1


@dataclass
class CostModel:
    """Seconds of calls: measured at some sizes, interpolated between them, and scaled as calls get dearer or cheaper."""

    full: tuple[tuple[int, float], ...] = ((1, 1.0), (2, 1.0 + _NOMINAL_SLOPE))
    """(tokens, seconds), ascending."""
    module: tuple[tuple[int, float], ...] = ((1, _NOMINAL_MODULE),)
    """(sequences, seconds), ascending."""
    full_scale: float = 1.0
    """Measured time of recent steps without drafts over the predicted one."""
    module_scale: float = 1.0
    """The same for what drafting added to recent steps."""

    def full_call(self, tokens: int) -> float:
        """Seconds of a full call over a number of tokens."""
        return self.full_scale * _interpolate(self.full, tokens)

    def module_call(self, sequences: int) -> float:
        """Seconds of a module call over a number of sequences."""
        return self.module_scale * _interpolate(self.module, sequences)

    def correct(self, tokens: int, drafting: int, longest: int, seconds: float) -> None:
        """Follows the machine: contexts grow, other programs come and go.

        tokens: of the full call. drafting, longest: sequences that drafted, and the longest chain.
        """
        if tokens > self.full[-1][0]:
            return
        full = self.full_call(tokens)
        if not drafting:
            self.full_scale *= 1 + _CORRECTION * (_bounded(seconds / full) - 1)
        else:
            added = longest * self.module_call(drafting)
            self.module_scale *= 1 + _CORRECTION * (_bounded((seconds - full) / added) - 1)


def _bounded(ratio: float) -> float:
    """A ratio of times, bounded: a single step may be slowed down by other programs."""
    return min(max(ratio, 0.2), 3.0)


def _interpolate(points: Sequence[tuple[int, float]], size: int) -> float:
    """Linear between measurements; beyond the last one with the slope of the last two, before the first one constant."""
    if size <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if size <= right or right == points[-1][0]:
            return low + max(high - low, 0.0) / (right - left) * (size - left)
    raise AssertionError("measurements are in ascending order")
