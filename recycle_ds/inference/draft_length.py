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
from statistics import median

MAX_DRAFT = 8
"""Longest draft tried."""
START = 4
"""Length of the first drafts, before anything is known."""

# Measurements of a cost that are kept; their median stands for it, so that one hiccup of the machine changes nothing.
_WINDOW = 5
# Measurements of the start length and of no drafting that are wanted before their costs are compared.
_TRUSTED = 3
# What is forgotten of older acceptances with every new one: the estimate follows about the last fifty.
_FORGET = 0.98
# Acceptance believed in before the first draft, and the number of observations this belief is worth.
_BELIEF = 0.75
_BELIEF_WEIGHT = 2.0
# Where costs are not to be measured: a full call's growth with each further token, and a module call, in full calls.
_NOMINAL_SLOPE = 0.05
_NOMINAL_MODULE = 0.1
# Cycles without drafts before the first probe and, after failed probes, at most.
_FIRST_PROBE = 32
_LAST_PROBE = 512


@dataclass(frozen=True)
class DraftStatistics:
    """What is known of drafting so far. Tuples are indexed by draft position, `full` by the call's number of drafts."""

    tested: tuple[float, ...]
    """Drafts that were judged (all before them accepted), older ones counting less."""
    accepted: tuple[float, ...]
    """Those of them that were accepted."""
    full: tuple[tuple[float, ...], ...]
    """Newest measurements of a full call, seconds."""
    module: tuple[float, ...] = ()
    """Newest measurements of a module call, seconds."""
    idle: int = 0
    """Cycles without drafts since the last one with."""
    patience: int = _FIRST_PROBE
    """Idle cycles after which a draft is tried again."""
    measured: bool = True
    """Whether costs come in; otherwise nominal ones are used, and choices depend on acceptance alone."""

    @property
    def max_draft(self) -> int:
        """Longest draft considered."""
        return len(self.tested)


def initial(max_draft: int = MAX_DRAFT, measured: bool = True) -> DraftStatistics:
    """Nothing known yet."""
    return DraftStatistics((0.0,) * max_draft, (0.0,) * max_draft, ((),) * (max_draft + 1), measured=measured)


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
    if drafted == 0:
        stats = replace(stats, idle=stats.idle + 1)
    else:
        failed_probe = stats.idle > 0
        patience = min(2 * stats.patience, _LAST_PROBE) if failed_probe else _FIRST_PROBE
        stats = replace(
            stats,
            tested=_observe(stats.tested, tested, tested),
            accepted=_observe(stats.accepted, tested, accepted),
            idle=0,
            patience=patience,
        )
    if full_seconds is not None and drafted < len(stats.full):
        full = list(stats.full)
        full[drafted] = (*full[drafted][1 - _WINDOW :], full_seconds)
        stats = replace(stats, full=tuple(full))
    if module_seconds is not None:
        stats = replace(stats, module=(*stats.module[1 - _WINDOW :], module_seconds))
    return stats


def choose(stats: DraftStatistics, limit: int) -> int:
    """The number of tokens to draft next, at most `limit` (what may still be produced, less one)."""
    limit = min(limit, stats.max_draft)
    if limit <= 0:
        return 0
    if stats.measured:
        start = min(START, stats.max_draft)
        if len(stats.full[start]) < _TRUSTED and limit >= start:
            return start
        if len(stats.full[0]) < _TRUSTED:
            return 0
    speeds = _speeds(stats, limit)
    best = max(range(limit + 1), key=speeds.__getitem__)
    if best == 0 and stats.idle >= stats.patience:
        return max(range(1, limit + 1), key=speeds.__getitem__)
    return best


def acceptance(stats: DraftStatistics) -> list[float]:
    """Estimated a_i. A position never reached is believed to do as well as the one before it."""
    estimates: list[float] = []
    belief = _BELIEF
    for tested, accepted in zip(stats.tested, stats.accepted, strict=True):
        belief = (accepted + _BELIEF_WEIGHT * belief) / (tested + _BELIEF_WEIGHT)
        estimates.append(belief)
    return estimates


def full_costs(stats: DraftStatistics) -> list[float]:
    """Seconds of a full call by number of drafts: medians, lines between them, the last slope (never down) beyond."""
    known = [(n, median(seconds)) for n, seconds in enumerate(stats.full) if seconds]
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
        if not left <= n <= right:
            slope = max(slope, 0.0)
        costs.append(max(left_cost + slope * (n - left), 0.0))
    return costs


def _speeds(stats: DraftStatistics, limit: int) -> list[float]:
    """Expected tokens per second with 0..limit drafts."""
    costs = full_costs(stats)
    if not stats.measured:
        module = _NOMINAL_MODULE
    else:
        module = median(stats.module) if stats.module else 0.0
    speeds: list[float] = []
    tokens, reached = 1.0, 1.0
    for n, chance in enumerate([1.0, *acceptance(stats)][: limit + 1]):
        if n:
            reached *= chance
            tokens += reached
        seconds = costs[n] + n * module
        speeds.append(tokens / seconds if seconds > 0 else math.inf)
    return speeds


def _observe(sums: Sequence[float], tested: int, hits: int) -> tuple[float, ...]:
    """Running sums with a new observation at positions 0..tested-1, of which the first `hits` count."""
    return tuple(
        total if position >= tested else _FORGET * total + (position < hits) for position, total in enumerate(sums)
    )
