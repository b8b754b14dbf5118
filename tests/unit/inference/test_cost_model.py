"""The cost model: sizes that were not measured, and what it learns from the steps of a machine that changes."""

from __future__ import annotations

import random

import pytest

from recycle_ds.inference.speculation.cost_model import CostModel


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (((1, 2.0),), [2.0] * 9),
        (((1, 1.0), (5, 3.0)), [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]),
        (((1, 1.0), (3, 2.0), (5, 2.0)), [1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        (((1, 2.0), (5, 1.0)), [2.0] * 9),  # noise; more tokens are not cheaper
        (((3, 1.0), (5, 2.0)), [1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]),
    ],
)
def test_unmeasured_sizes_are_estimated_from_their_neighbours(
    points: tuple[tuple[int, float], ...], expected: list[float]
) -> None:
    """Prevents an unmeasured size from being rated as free, or as cheaper than smaller ones."""
    model = CostModel(full=points)
    assert [model.full_call(tokens) for tokens in range(1, 10)] == pytest.approx(expected)


def test_what_drafts_add_is_learned_apart_from_what_a_plain_step_costs() -> None:
    """Prevents drafts that look cheap for ever because their costs were measured on short contexts: verified decoding of
    8 sequences was 8 % slower than autoregressive decoding."""
    model = CostModel(((1, 1.0), (16, 2.5)), ((1, 0.1), (8, 0.1)), ((1, 0.2), (8, 0.2)))
    assert model.drafts(8, 1) == pytest.approx(0.2) and model.drafts(8, 3) == pytest.approx(0.4)
    plain = model.full_call(8)
    assert model.step(8, 12, 8, 3) == pytest.approx(plain + 0.4 + 0.4)
    for _ in range(500):
        model.correct(8, 8, 0, 0, 1.2 * plain)  # the machine has become slower
        model.correct(8, 12, 8, 3, 1.2 * plain + 2.0)
    assert model.full_call(8) == pytest.approx(1.2 * plain, rel=1e-3)
    assert model.step(8, 12, 8, 3) == pytest.approx(1.2 * plain + 2.0, rel=1e-2)
    assert model.step(8, 8, 0, 0) == model.full_call(8)


def test_a_machine_that_becomes_slower_does_not_make_drafts_dear() -> None:
    """Prevents drafts that are given up for good because other programs slowed down a stream that always drafts: its steps
    became 1.4 times as long, and all of that was taken for the drafts' cost."""
    model = CostModel(((1, 1.0), (16, 2.5)), ((1, 0.1), (8, 0.1)))
    before = model.step(1, 8, 1, 2) / model.full_call(1)
    for _ in range(300):
        model.correct(1, 8, 1, 2, 1.4 * before)
    assert model.full_call(1) == pytest.approx(1.4, rel=0.1)
    assert model.step(1, 8, 1, 2) / model.full_call(1) == pytest.approx(before, rel=0.1)
    for _ in range(300):
        model.correct(1, 8, 1, 2, before)
    assert model.step(1, 8, 1, 2) / model.full_call(1) == pytest.approx(before, rel=0.02), "and back"


def test_each_size_has_a_cost_of_its_own() -> None:
    """Prevents a batch of 8 that verifies a few drafts at a loss for ever: a call over 12 tokens was timed on one context as
    hardly dearer than over 8, and took a quarter more time over texts."""
    model = CostModel(((1, 0.8), (8, 1.0), (10, 1.03), (12, 1.05), (16, 1.5)), ((1, 0.1), (8, 0.1)))
    draw = random.Random(1)
    for _ in range(1500):
        noise = 1 + 0.05 * (2 * draw.random() - 1)
        model.correct(8, 8, 0, 0, 1.1 * noise)
        model.correct(8, 10, 0, 0, 1.13 * noise)
        model.correct(8, 12, 0, 0, 1.4 * noise)
    assert model.full_call(8) == pytest.approx(1.1, rel=0.05)
    assert model.step(8, 10, 0, 0) == pytest.approx(1.13, rel=0.05)
    assert model.step(8, 12, 0, 0) == pytest.approx(1.4, rel=0.05)
    assert model.steps(8, 8, 16, 0, 0) == pytest.approx([model.step(8, size, 0, 0) for size in range(8, 17)])
    slower = [model.step(8, size, 0, 0) / model.full_call(8) for size in (9, 12, 14)]
    for _ in range(300):
        model.correct(8, 12, 0, 0, 2.8)  # everything is slower, and only this size is seen
    assert [model.step(8, size, 0, 0) / model.full_call(8) for size in (9, 12, 14)] == pytest.approx(slower, rel=0.1)


@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_costs_that_do_not_ascend_are_not_driven_to_their_bounds(noise: float) -> None:
    """Prevents corrections of single sizes that drift to their bounds, and all other costs with them, where a larger call takes
    no longer than a smaller one: longer contexts in the smaller batch, or a flat run of measurements."""
    draw = random.Random(5)
    sizes = ((1, 5.0), (2, 5.2), (4, 5.6), (8, 6.4), (12, 7.0), (16, 9.0), (32, 16.0))
    for true in ({8: 7.4, 12: 7.0}, {8: 6.7, 12: 6.7}):
        model = CostModel(sizes, ((1, 0.1),))
        for step in range(4000):
            size = (8, 12)[step // 5 % 2]
            model.correct(size, size, 0, 0, true[size] * (1 + noise * (2 * draw.random() - 1)))
        assert [model.full_call(size) for size in (8, 12)] == pytest.approx([7.0, 7.0], rel=0.07)
        assert model.full_call(1) == pytest.approx(5.0, rel=0.1)
        costs = [model.full_call(size) for size in range(1, 33)]
        assert costs == sorted(costs)


def test_single_slow_steps_hardly_count() -> None:
    """Prevents a step that another program made ten times as long from deciding about drafts."""
    model = CostModel(((1, 1.0), (16, 2.5)), ((1, 0.1), (8, 0.1)))
    before = model.step(1, 8, 1, 2)
    model.correct(1, 8, 1, 2, 10 * before)
    assert model.step(1, 8, 1, 2) < 1.08 * before


def test_steps_that_are_cheaper_than_known_do_not_make_drafts_free() -> None:
    """Prevents a cost of drafts that shrinks to nothing while known costs are too high, and with which a larger batch then
    drafts at a loss for ever."""
    model = CostModel(((1, 1.0), (128, 3.0)), ((1, 0.01), (16, 0.01)))
    for _ in range(2000):
        model.correct(1, 5, 1, 4, 0.85)  # the machine is a fifth faster than when it was measured
    assert model.step(1, 5, 1, 4) == pytest.approx(0.85, rel=0.01)
    assert model.step(16, 128, 16, 7) - model.full_call(16) > 0.1 * (3.0 - 1.2)
    for _ in range(200):
        model.correct(16, 128, 16, 7, 4.0)
    assert model.step(16, 128, 16, 7) == pytest.approx(4.0, rel=0.1)
