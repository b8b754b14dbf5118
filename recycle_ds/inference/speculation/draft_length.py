"""How many tokens to draft: from measured acceptance and measured cost, per cycle.

With a_i the probability that draft i is accepted given that all before it were, F(n) the seconds of a full call over
1 + n tokens and m those of a module call, n drafts bring 1 + a_1 + a_1 a_2 + ... tokens in F(n) + n m seconds (as in
Leviathan et al., arXiv 2211.17192, theorem 3.8, where all a_i and F(n) are equal). `choose` maximises the quotient over
n = 0..max; 0 turns drafting off where it does not pay, and is left again for a probe, less and less often, as long as
the probes fail. `update` and `choose` are pure: costs are passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MAX_DRAFT = 8
"""Longest draft tried."""
START = 4
"""Length of the first drafts, and of probes."""

# Newest measurements of a cost that are kept, and those of no drafting that are wanted before costs are compared.
_WINDOW, _TRUSTED = 7, 3
# Cycles after which a measurement says nothing any more: calls grow dearer as the context fills.
_STALE = 256
# What is forgotten of older acceptances with every new one: the estimate follows about the last fifty.
_FORGET = 0.98
# Acceptance believed in before the first draft, and the number of observations this belief is worth.
_BELIEF, _BELIEF_WEIGHT = 0.75, 2.0
# Where costs are not to be measured: a full call's growth with each further token, and a module call, in full calls.
_NOMINAL_SLOPE, _NOMINAL_MODULE = 0.05, 0.1
# A probe: cycles it lasts; what acceptances from before it still weigh; cycles without drafts before the first one and,
# after failed ones, at most.
_PROBE, _PROBE_MEMORY, _FIRST_PROBE, _LAST_PROBE = 3, 8.0, 32, 512


@dataclass(frozen=True)
class DraftStatistics:
    """What is known of drafting so far. Tuples are indexed by draft position, `full` by the call's number of drafts."""

    tested: tuple[float, ...]
    """Drafts that were judged (all before them accepted), older ones counting less."""
    accepted: tuple[float, ...]
    """Those of them that were accepted."""
    full: tuple[tuple[float, ...], ...]
    """Newest measurements of a full call, seconds."""
    measured_at: tuple[int, ...]
    """Cycle of the newest measurement in `full`."""
    module: tuple[float, ...] = ()
    """Newest measurements of a module call, seconds."""
    cycle: int = 0
    """Cycles so far."""
    idle: int = 0
    """Cycles without drafts since the last one with."""
    patience: int = _FIRST_PROBE
    """Idle cycles after which drafts are tried again."""
    probe: int = _PROBE
    """Cycles left of the probe under way."""
    measured: bool = True
    """Whether costs come in; otherwise nominal ones are used, and choices depend on acceptance alone."""

    @property
    def max_draft(self) -> int:
        """Longest draft considered."""
        return len(self.tested)

    def fresh(self, drafted: int) -> tuple[float, ...]:
        """Measurements of a full call with that many drafts, none if they are too old."""
        return self.full[drafted] if self.cycle - self.measured_at[drafted] <= _STALE else ()


def initial(max_draft: int = MAX_DRAFT, measured: bool = True) -> DraftStatistics:
    """Nothing known yet."""
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
    """Adds a cycle: `drafted` tokens, of which the first `tested` were judged and the first `accepted` kept.

    full_seconds: the full call over 1 + drafted tokens. module_seconds: one module call. None: not measured.
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
    """The number of tokens to draft next, at most `limit` (what may still be produced, less one)."""
    limit = min(limit, stats.max_draft)
    if limit <= 0:
        return 0
    if stats.probe > 0:
        return min(START, limit)
    if stats.measured and len(stats.fresh(0)) < _TRUSTED:
        return 0
    speeds = _speeds(stats, limit)
    best = max(range(limit + 1), key=speeds.__getitem__)
    return min(START, limit) if best == 0 and stats.idle >= stats.patience else best


def acceptance(stats: DraftStatistics) -> list[float]:
    """Estimated a_i. A position never reached is believed to do as well as the one before it."""
    estimates: list[float] = []
    belief = _BELIEF
    for tested, accepted in zip(stats.tested, stats.accepted, strict=True):
        belief = (accepted + _BELIEF_WEIGHT * belief) / (tested + _BELIEF_WEIGHT)
        estimates.append(belief)
    return estimates


def full_costs(stats: DraftStatistics) -> list[float]:
    """Seconds of a full call by number of drafts: measured, lines between, the last slope (never down) beyond."""
    windows = [stats.fresh(n) for n in range(stats.max_draft + 1)]
    known = [(n, _typical(seconds)) for n, seconds in enumerate(windows) if seconds]
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
        module = _typical(stats.module) if stats.module else 0.0
    speeds: list[float] = []
    tokens, reached = 1.0, 1.0
    for n, chance in enumerate([1.0, *acceptance(stats)][: limit + 1]):
        if n:
            reached *= chance
            tokens += reached
        seconds = costs[n] + n * module
        speeds.append(tokens / seconds if seconds > 0 else math.inf)
    return speeds


def _typical(seconds: Sequence[float]) -> float:
    """The lower quartile: other programs make calls slower, never faster, and often several in a row."""
    return sorted(seconds)[(len(seconds) - 1) // 4]


def _add_drafts(stats: DraftStatistics, tested: int, accepted: int) -> DraftStatistics:
    """Adds judged drafts, and moves the probe on: one begins with the first drafts after `patience` idle cycles."""
    hits, trials = stats.accepted, stats.tested
    probe, patience = max(stats.probe - 1, 0), stats.patience
    if stats.idle >= stats.patience:
        probe, patience = _PROBE - 1, min(2 * stats.patience, _LAST_PROBE)
        # What was seen before the pause counts for little: the text has moved on.
        weights = [min(1.0, _PROBE_MEMORY / total) if total else 1.0 for total in trials]
        trials = tuple(weight * total for weight, total in zip(weights, trials, strict=True))
        hits = tuple(weight * total for weight, total in zip(weights, hits, strict=True))
    elif stats.probe == 0:
        patience = _FIRST_PROBE
    return replace(
        stats,
        tested=_observe(trials, tested, tested),
        accepted=_observe(hits, tested, accepted),
        idle=0,
        probe=probe,
        patience=patience,
    )


def _observe(sums: Sequence[float], tested: int, hits: int) -> tuple[float, ...]:
    """Running sums with a new observation at positions 0..tested-1, of which the first `hits` count."""
    return tuple(
        total if position >= tested else _FORGET * total + (position < hits) for position, total in enumerate(sums)
    )
