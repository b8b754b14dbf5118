"""What calls of the model cost by their size: measured, interpolated and corrected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from recycle_ds.inference.speculation.tree import MAX_NODES

# Cost model before anything is measured: each further token of a full call, and a module call, in full calls.
_NOMINAL_SLOPE, _NOMINAL_MODULE = 0.05, 0.1
# Weights of a new measurement in the corrections of all costs, and of what drafts cost in proportion to a full call.
_CORRECTION, _CONTRAST = 0.1, 0.04
# Weight of a new measurement in the correction of calls of its size alone, the most that this corrects, and how fast such
# corrections are forgotten: without that they would drift away together, and `full_scale` with them in the other direction.
_OWN_CORRECTION, _MOST_OWN, _FORGOTTEN = 0.05, 2.0, 0.004
# Most that drafts may be taken to cost in terms of what was measured: beyond, something else has become slower or faster.
_MOST_SCALE = 5.0


@dataclass
class CostModel:
    """Seconds of calls: measured at some sizes, interpolated between them, and scaled as calls get dearer or cheaper."""

    full: tuple[tuple[int, float], ...] = ((1, 1.0), (2, 1.0 + _NOMINAL_SLOPE))
    """A full call: (tokens, seconds), ascending."""
    module: tuple[tuple[int, float], ...] = ((1, _NOMINAL_MODULE),)
    """A module call for each depth of the drafts after the first: (sequences, seconds), ascending."""
    first: tuple[tuple[int, float], ...] = ()
    """The first drafts, for which the module reads what has become known: (sequences, seconds), ascending. Empty: as
    much as `module`."""
    full_scale: float = 1.0
    """How much more time calls take than when they were measured."""
    sizes_scale: list[float] = field(default_factory=list)
    """How much more time full calls of each measured size take, beyond `full_scale`: attention to many contexts, and tokens
    that are not as easy to choose as those that were timed."""
    drafting_scale: float = 1.0
    """How much more what drafts add to a step takes, those verified and those made, in proportion to full calls."""

    _common_error: float = field(default=0.0, init=False, repr=False, compare=False)
    """The mean error of the latest steps."""
    _sizes: list[tuple[int, float]] = field(default_factory=list, init=False, repr=False, compare=False)
    """What full calls of the measured sizes take now, but for `full_scale`."""

    def __post_init__(self) -> None:
        self.sizes_scale = self.sizes_scale or [1.0] * len(self.full)
        self._sizes = [(size, seconds * own) for (size, seconds), own in zip(self.full, self.sizes_scale, strict=True)]

    def full_call(self, tokens: int) -> float:
        """Seconds of a full call over a number of tokens, one of each sequence."""
        return self.full_scale * _interpolate(self._sizes, tokens)

    def drafts(self, sequences: int, longest: float) -> float:
        """Seconds that drafts take to make. longest: depth of the deepest ones, which may be a mean."""
        if longest == 0:
            return 0.0
        further = _interpolate(self.module, sequences)
        first = _interpolate(self.first, sequences) if self.first else further
        return self.full_scale * self.drafting_scale * (first + (longest - 1) * further)

    def step(self, sequences: int, tokens: int, drafting: int, longest: int) -> float:
        """Seconds of a step. sequences: that decode. tokens: of the full call, drafts to be verified among them. drafting,
        longest: sequences that make drafts, and the depth to which one of them makes the most."""
        plain = self.full_call(sequences)
        verified = self.drafting_scale * (self.full_call(tokens) - plain)
        return plain + verified + self.drafts(drafting, longest)

    def steps(self, sequences: int, first: int, last: int, drafting: int, longest: float) -> list[float]:
        """Seconds of a step for every number of tokens from `first` to `last`; see `step`."""
        plain = self.full_call(sequences)
        scale = self.drafting_scale * self.full_scale
        rest = plain * (1 - self.drafting_scale) + self.drafts(drafting, longest)
        return [rest + scale * cost for cost in _interpolate_range(self._sizes, first, last)]

    def can_pay(self, sequences: int, tokens: int, gain: float) -> bool:
        """Whether any number of drafts could raise tokens per second by the factor `gain`, if all were accepted and took no
        time to make. tokens: of the full call without them."""
        most = max(sequences, MAX_NODES)
        seconds = self.steps(sequences, tokens, tokens + most, 0, 0)
        return any((sequences + n) * seconds[0] >= gain * sequences * seconds[n] for n in range(1, most + 1))

    def correct(self, sequences: int, tokens: int, drafting: int, longest: int, seconds: float) -> None:
        """Follows the machine: contexts grow, other programs come and go. Arguments as in `step`, and what it took.

        An error is first of all one of all costs: a machine that has become slower makes every step slower, and a stream that
        always drafts has no steps without drafts to compare with. Where steps with drafts have other errors than those
        without, the difference is the drafts'. By how much more a step errs than those before it, calls of its size alone are
        corrected.
        """
        if tokens > self.full[-1][0]:
            return
        error = _bounded(seconds / self.step(sequences, tokens, drafting, longest)) - 1
        drafted = drafting > 0 or tokens > sequences
        self.full_scale *= 1 + _CORRECTION * error
        scale = self.drafting_scale * (1 + (_CONTRAST if drafted else -_CONTRAST) * error)
        self.drafting_scale = min(max(scale, 1 / _MOST_SCALE), _MOST_SCALE)
        own_error = error - self._common_error
        self._common_error += _CORRECTION * own_error
        for at, share in _neighbours(self.full, tokens):
            self._correct_size(at, share * own_error)

    def _correct_size(self, at: int, error: float) -> None:
        """Corrects the cost of one measured size. It stays between those of its neighbours: below the one on the left it would
        change nothing any more, see `_interpolate`, and go on to its bound."""
        (size, seconds), own = self.full[at], self.sizes_scale[at]
        own += own * _OWN_CORRECTION * error + _FORGOTTEN * (1 - own)
        own = min(max(own, 1 / _MOST_OWN), _MOST_OWN)
        least = self._sizes[at - 1][1] if at else 0.0
        most = self._sizes[at + 1][1] if at + 1 < len(self._sizes) else math.inf
        now = max(min(own * seconds, most), least)
        self.sizes_scale[at], self._sizes[at] = now / seconds, (size, now)


def _bounded(ratio: float) -> float:
    """A ratio of times, bounded: a single step may be slowed down by other programs."""
    return min(max(ratio, 0.5), 1.5)


def _neighbours(points: Sequence[tuple[int, float]], size: int) -> list[tuple[int, float]]:
    """The measurements between which a size lies, and their shares in what is interpolated for it."""
    after = next((at for at, (own, _) in enumerate(points) if own >= size), len(points) - 1)
    if after == 0 or points[after][0] <= size:
        return [(after, 1.0)]
    share = (size - points[after - 1][0]) / (points[after][0] - points[after - 1][0])
    return [(after - 1, 1 - share), (after, share)]


def _interpolate(points: Sequence[tuple[int, float]], size: int) -> float:
    """Linear between measurements; beyond the last one with the slope of the last two, before the first one constant."""
    if size <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if size <= right or right == points[-1][0]:
            return low + max(high - low, 0.0) / (right - left) * (size - left)
    raise AssertionError("measurements are in ascending order")


def _interpolate_range(points: Sequence[tuple[int, float]], first: int, last: int) -> list[float]:
    """The same for all sizes from `first` to `last`."""
    found: list[float] = []
    size = first
    for (left, low), (right, high) in pairwise(points):
        until = last if right == points[-1][0] else min(right, last)
        slope = max(high - low, 0.0) / (right - left)
        while size <= until:  # as `_interpolate` computes it, but without looking for the segment each time
            found.append(low + slope * (size - left) if size > left else low)
            size += 1
    return found or [points[0][1]] * (last + 1 - first)
