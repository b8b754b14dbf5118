"""The adaptive draft length, on simulated models with given costs, without a clock."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from recycle_ds.inference.speculation.draft_length import (
    MAX_DRAFT,
    START,
    DraftStatistics,
    acceptance,
    choose,
    full_costs,
    initial,
    update,
)


def _simulate(
    rates: list[float],
    slope: float,
    module: float,
    cycles: int = 600,
    statistics: DraftStatistics | None = None,
    noise: float = 0.0,
) -> tuple[list[int], DraftStatistics]:
    """Simulates cycles with the given acceptance by position and costs (in full calls). Returns the chosen lengths."""
    generator = random.Random(3)
    statistics = statistics or initial()
    lengths = []
    for _ in range(cycles):
        drafted = choose(statistics, 1000)
        accepted = 0
        while accepted < drafted and generator.random() < rates[accepted]:
            accepted += 1
        slowdown = 20.0 if noise and generator.random() < noise else 1.0
        statistics = update(
            statistics,
            drafted,
            min(drafted, accepted + 1),
            accepted,
            (1 + slope * drafted) * slowdown,
            module * slowdown if drafted else None,
        )
        lengths.append(drafted)
    return lengths, statistics


def _speeds(rates: list[float], slope: float, module: float) -> list[float]:
    """The formula, evaluated directly: tokens per unit of time for every length."""
    speeds = []
    for drafted in range(MAX_DRAFT + 1):
        tokens = reached = 1.0
        for rate in rates[:drafted]:
            reached *= rate
            tokens += reached
        speeds.append(tokens / (1 + slope * drafted + module * drafted))
    return speeds


@pytest.mark.parametrize(
    ("rates", "slope", "module"),
    [
        ([0.95] * 8, 0.01, 0.02),
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], 0.02, 0.06),
        ([0.8, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 0.05, 0.1),
        ([0.6] * 8, 0.2, 0.1),
    ],
)
def test_it_converges_to_the_best_speed(rates: list[float], slope: float, module: float) -> None:
    """Prevents an adaptation that optimises anything but tokens per second."""
    lengths, _ = _simulate(rates, slope, module)
    speeds = _speeds(rates, slope, module)
    assert sum(speeds[length] for length in lengths[300:]) / 300 > 0.96 * max(speeds)


def test_it_turns_drafting_off_if_it_does_not_pay() -> None:
    """Prevents decoding that is slower with drafts than without them."""
    lengths, _ = _simulate([0.1] * 8, 0.3, 0.4)
    assert sum(length > 0 for length in lengths[50:]) <= 24  # probes


def test_probes_become_rare_if_no_draft_is_accepted() -> None:
    """Prevents probes from costing as much as turning drafts off saves."""
    lengths, _ = _simulate([0.0] * 8, 0.3, 0.4, cycles=4000)
    early, late = (sum(length > 0 for length in part) for part in (lengths[10:1010], lengths[3000:]))
    assert 0 < late < early / 2


def test_drafting_resumes_when_drafts_are_accepted_again() -> None:
    """Prevents drafting from staying off permanently after one passage with low acceptance."""
    _, statistics = _simulate([0.0] * 8, 0.05, 0.1, cycles=400)
    lengths, _ = _simulate([0.95] * 8, 0.05, 0.1, cycles=1200, statistics=statistics)
    assert sum(lengths[600:]) / len(lengths[600:]) > 3


def test_single_slow_calls_are_ignored() -> None:
    """Prevents single slow calls (interference from another program) from turning drafting off."""
    lengths, _ = _simulate([0.9] * 8, 0.02, 0.05, noise=0.08)
    assert sum(lengths[100:]) / len(lengths[100:]) > 4


def test_the_length_never_exceeds_the_limit() -> None:
    """Prevents drafts after the last allowed token."""
    _, good = _simulate([0.99] * 8, 0.0, 0.01)
    for statistics in (initial(), good, initial(measured=False), initial(max_draft=2)):
        for limit in range(12):
            assert 0 <= choose(statistics, limit) <= min(limit, statistics.max_draft)
    assert choose(good, 100) == MAX_DRAFT


def test_the_first_cycles_measure_with_and_without_drafts() -> None:
    """Prevents a comparison with a cost that was never measured."""
    lengths, _ = _simulate([0.9] * 8, 0.01, 0.02, cycles=6)
    assert lengths == [START] * 3 + [0] * 3


def test_without_measured_costs_choices_depend_on_acceptance_alone() -> None:
    """Prevents a seeded generation that depends on the machine's speed."""
    statistics = initial(measured=False)
    slow, fast = statistics, statistics
    for _ in range(50):
        assert choose(slow, 20) == choose(fast, 20)
        slow = update(slow, 4, 2, 1)
        fast = update(fast, 4, 2, 1)
    assert choose(slow, 20) < START


def test_update_does_not_modify_its_argument() -> None:
    """Prevents two generations that share statistics from changing each other's statistics."""
    statistics = initial()
    copy = replace(statistics)
    update(statistics, 4, 3, 2, 1.0, 0.1)
    assert statistics == copy


def test_acceptance_of_unseen_positions_follows_the_position_before() -> None:
    """Prevents a later position that was never reached from being rated better than an earlier one that fails."""
    statistics = initial()
    for _ in range(60):
        statistics = update(statistics, 4, 1, 0, 1.0, 0.1)
    estimates = acceptance(statistics)
    assert estimates[0] < 0.1
    assert estimates == sorted(estimates, reverse=True)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({2: 3.0}, [3.0] * 9),
        ({0: 1.0, 4: 3.0}, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]),
        ({0: 1.0, 2: 2.0, 4: 2.0}, [1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ({0: 2.0, 4: 1.0}, [2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0, 1.0, 1.0]),  # noise; not cheaper beyond
        ({2: 1.0, 4: 2.0}, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]),
    ],
)
def test_unmeasured_widths_are_estimated_from_their_neighbours(
    measured: dict[int, float], expected: list[float]
) -> None:
    """Prevents an unmeasured width from being rated as free, or as cheaper than narrower ones."""
    statistics = initial()
    for drafted, seconds in measured.items():
        statistics = update(statistics, drafted, 0, 0, seconds)
    assert full_costs(statistics) == pytest.approx(expected)
