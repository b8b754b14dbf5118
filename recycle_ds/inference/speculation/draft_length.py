"""Adaptive draft length: chosen per cycle from measured acceptance and measured cost.

Let a_i be the probability that draft i is accepted given that all drafts before it were, F(n) the seconds of a full call
over 1 + n tokens, and m the seconds of a module call. Then n drafts yield 1 + a_1 + a_1 a_2 + ... expected tokens in
F(n) + n m seconds (as in Leviathan et al., arXiv 2211.17192, theorem 3.8, where all a_i and F(n) are equal). `choose`
maximises tokens per second over n = 0..max. n = 0 turns drafting off when it does not pay; short probes then retry
drafting, at increasing intervals while they fail. `update` and `choose` are pure functions: costs are passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MAX_DRAFT = 8
"""Maximum draft length."""
START = 4
"""Draft length of the first cycles and of probes."""

# Number of recent measurements kept per cost, and of measurements without drafts required before costs are compared.
_WINDOW, _MIN_BASELINE = 7, 3
# Cycles after which measurements are discarded: calls become more expensive as the context grows.
_MAX_AGE = 256
# Decay of older acceptance counts with every new observation: the estimate covers about the last fifty.
_DECAY = 0.98
# Prior acceptance rate, and its weight in observations.
_PRIOR, _PRIOR_WEIGHT = 0.75, 2.0
# Nominal costs, in full calls, if costs are not measured: each further token of a full call, and a module call.
_NOMINAL_SLOPE, _NOMINAL_MODULE = 0.05, 0.1
# Probes: duration in cycles; maximum weight of earlier observations, in observations; cycles without drafts before the first
# probe, and the maximum after failed probes.
_PROBE, _PROBE_MEMORY, _FIRST_PATIENCE, _MAX_PATIENCE = 3, 8.0, 32, 512


@dataclass(frozen=True)
class DraftStatistics:
    """Statistics of drafting so far. Tuples are indexed by draft position, `full` by the number of drafts in the call."""

    tested: tuple[float, ...]
    """Drafts that were verified (all before them accepted). Older ones decay."""
    accepted: tuple[float, ...]
    """Drafts that were accepted. Older ones decay."""
    full: tuple[tuple[float, ...], ...]
    """Recent measurements of a full call, in seconds."""
    measured_at: tuple[int, ...]
    """Cycle of the latest measurement in `full`."""
    module: tuple[float, ...] = ()
    """Recent measurements of a module call, in seconds."""
    cycle: int = 0
    """Cycles so far."""
    idle: int = 0
    """Consecutive cycles without drafts."""
    patience: int = _FIRST_PATIENCE
    """Idle cycles before the next probe."""
    probe: int = _PROBE
    """Remaining cycles of the current probe."""
    measured: bool = True
    """Whether costs are measured. Otherwise nominal costs are used, and choices depend on acceptance only."""

    @property
    def max_draft(self) -> int:
        """Maximum draft length considered."""
        return len(self.tested)

    def fresh(self, drafted: int) -> tuple[float, ...]:
        """Measurements of a full call with `drafted` drafts; empty if they are too old."""
        return self.full[drafted] if self.cycle - self.measured_at[drafted] <= _MAX_AGE else ()


def initial(max_draft: int = MAX_DRAFT, measured: bool = True) -> DraftStatistics:
    """Statistics before the first cycle."""
    return DraftStatistics(
        tested=(0.0,) * max_draft,
        accepted=(0.0,) * max_draft,
        full=((),) * (max_draft + 1),
        measured_at=(0,) * (max_draft + 1),
        probe=_PROBE if measured else 0,
        measured=measured,
    )


def update(
    stats: DraftStatistics,
    drafted: int,
    tested: int,
    accepted: int,
    full_seconds: float | None = None,
    module_seconds: float | None = None,
) -> DraftStatistics:
    """Adds one cycle: `drafted` tokens, of which the first `tested` were verified and the first `accepted` accepted.

    full_seconds: duration of the full call over 1 + drafted tokens. module_seconds: duration of one module call. None: not
    measured.
    """
    stats = replace(stats, cycle=stats.cycle + 1)
    if drafted == 0:
        stats = replace(stats, idle=stats.idle + 1)
    else:
        stats = _add_drafts(stats, tested, accepted)
    if full_seconds is not None and drafted < len(stats.full):
        full, measured_at = list(stats.full), list(stats.measured_at)
        full[drafted] = (*stats.fresh(drafted)[1 - _WINDOW :], full_seconds)
        measured_at[drafted] = stats.cycle
        stats = replace(stats, full=tuple(full), measured_at=tuple(measured_at))
    if module_seconds is not None:
        stats = replace(stats, module=(*stats.module[1 - _WINDOW :], module_seconds))
    return stats


def choose(stats: DraftStatistics, limit: int) -> int:
    """Number of tokens to draft next, at most `limit` (the remaining new tokens minus one)."""
    limit = min(limit, stats.max_draft)
    if limit <= 0:
        return 0
    if stats.probe > 0:
        return min(START, limit)
    if stats.measured and len(stats.fresh(0)) < _MIN_BASELINE:
        return 0
    speeds = _speeds(stats, limit)
    best = max(range(limit + 1), key=speeds.__getitem__)
    return min(START, limit) if best == 0 and stats.idle >= stats.patience else best


def acceptance(stats: DraftStatistics) -> list[float]:
    """Estimated a_i. The prior of each position is the estimate of the position before it."""
    estimates: list[float] = []
    estimate = _PRIOR
    for tested, accepted in zip(stats.tested, stats.accepted, strict=True):
        estimate = (accepted + _PRIOR_WEIGHT * estimate) / (tested + _PRIOR_WEIGHT)
        estimates.append(estimate)
    return estimates


def full_costs(stats: DraftStatistics) -> list[float]:
    """Seconds of a full call by number of drafts: measured, interpolated, or extrapolated with a slope of at least 0."""
    windows = [stats.fresh(n) for n in range(stats.max_draft + 1)]
    known = [(n, _lower_quartile(seconds)) for n, seconds in enumerate(windows) if seconds]
    if not stats.measured or not known:
        return [1 + _NOMINAL_SLOPE * n for n in range(stats.max_draft + 1)]
    if len(known) == 1:
        return [known[0][1]] * (stats.max_draft + 1)
    costs: list[float] = []
    segment = 0
    for n in range(stats.max_draft + 1):
        while segment < len(known) - 2 and n > known[segment + 1][0]:
            segment += 1
        (left, left_cost), (right, right_cost) = known[segment : segment + 2]
        slope = (right_cost - left_cost) / (right - left)
        if n > right:
            costs.append(right_cost + max(slope, 0.0) * (n - right))
        elif n < left:
            costs.append(max(left_cost - max(slope, 0.0) * (left - n), 0.0))
        else:
            costs.append(left_cost + slope * (n - left))
    return costs


def _speeds(stats: DraftStatistics, limit: int) -> list[float]:
    """Expected tokens per second with 0..limit drafts."""
    costs = full_costs(stats)
    if not stats.measured:
        module = _NOMINAL_MODULE
    else:
        module = _lower_quartile(stats.module) if stats.module else 0.0
    speeds: list[float] = []
    tokens, reached = 1.0, 1.0
    for n, probability in enumerate([1.0, *acceptance(stats)][: limit + 1]):
        if n:
            reached *= probability
            tokens += reached
        seconds = costs[n] + n * module
        speeds.append(tokens / seconds if seconds > 0 else math.inf)
    return speeds


def _lower_quartile(seconds: Sequence[float]) -> float:
    """A robust estimate: other programs only make calls slower, and often several in a row."""
    return sorted(seconds)[(len(seconds) - 1) // 4]


def _add_drafts(stats: DraftStatistics, tested: int, accepted: int) -> DraftStatistics:
    """Adds verified drafts and advances the probe. A probe starts with the first drafts after `patience` idle cycles."""
    hits, trials = stats.accepted, stats.tested
    probe, patience = max(stats.probe - 1, 0), stats.patience
    if stats.idle >= stats.patience:
        probe, patience = _PROBE - 1, min(2 * stats.patience, _MAX_PATIENCE)
        # Observations from before the pause are weighted down: the text has changed since.
        weights = [min(1.0, _PROBE_MEMORY / total) if total else 1.0 for total in trials]
        trials = tuple(weight * total for weight, total in zip(weights, trials, strict=True))
        hits = tuple(weight * total for weight, total in zip(weights, hits, strict=True))
    elif stats.probe == 0:
        patience = _FIRST_PATIENCE
    return replace(
        stats,
        tested=_observe(trials, tested, tested),
        accepted=_observe(hits, tested, accepted),
        idle=0,
        probe=probe,
        patience=patience,
    )


def _observe(sums: Sequence[float], tested: int, hits: int) -> tuple[float, ...]:
    """Decaying sums with a new observation at positions 0..tested-1: 1 at the first `hits` positions, else 0."""
    return tuple(
        total if position >= tested else _DECAY * total + (position < hits) for position, total in enumerate(sums)
    )
