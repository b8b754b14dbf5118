"""The draft budget, on simulated batches with given costs, without a clock."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.inference.speculation.acceptance import MAX_DRAFT, Calibration, Candidate, Verified
from recycle_ds.inference.speculation.budget import START, DraftBudget
from recycle_ds.inference.speculation.cost_model import CostModel
from recycle_ds.inference.speculation.tree import MAX_NODES


def costs(slope: float, module: float, module_slope: float = 0.0) -> CostModel:
    """A full call costs 1 + slope for each further token; a module call `module` plus its slope."""
    return CostModel(((1, 1.0), (1001, 1.0 + 1000 * slope)), ((1, module), (1001, module + 1000 * module_slope)))


def simulate(
    budget: DraftBudget, rates: list[list[float]], steps: int = 600, seed: int = 3
) -> tuple[list[list[int]], float]:
    """Simulates a batch of chains that have the given acceptance by position. The confidence of a draft is its rate.

    Returns the numbers of verified drafts by step, and the tokens per unit of time over the second half.
    """
    draw = random.Random(seed)
    made = [0] * len(rates)
    verified, tokens, seconds = [], 0, 0.0
    for step in range(steps):
        candidates = [Candidate(i, tuple(rates[i][: made[i]]), None, 1000) for i in range(len(rates))]
        counts = [len(nodes) for nodes in budget.verify(candidates)]
        verified.append(counts)
        kept = len(rates)
        for i, count in enumerate(counts):
            accepted = 0
            while accepted < count and draw.random() < rates[i][accepted]:
                accepted += 1
            if made[i]:
                path = range(1, accepted + 1)
                budget.observe(
                    Verified(i, candidates[i].confidences[:count], (), path, made[i], min(count, accepted + 1))
                )
            kept += accepted
        made = [budget.draft(i) for i in range(len(rates))]
        if step >= steps // 2:
            tokens += kept
            seconds += budget.costs.step(len(rates), len(rates) + sum(counts), len(rates), max(made))
    return verified, tokens / seconds


def best_speed(rate: list[float], slope: float, module: float) -> float:
    """The formula for one sequence, evaluated directly: most tokens per unit of time over all lengths."""
    speeds = []
    for drafted in range(MAX_DRAFT + 1):
        tokens = reached = 1.0
        for chance in rate[:drafted]:
            reached *= chance
            tokens += reached
        speeds.append(tokens / (1 + slope * drafted + module * drafted))
    return max(speeds)


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
    """Prevents a budget that optimises anything but tokens per second."""
    speeds = [simulate(DraftBudget(costs(slope, module)), [rates], 1200, seed)[1] for seed in range(4)]
    assert sum(speeds) / 4 > 0.94 * best_speed(rates, slope, module)


@pytest.mark.parametrize("batch", [1, 8])
def test_it_turns_drafting_off_if_it_does_not_pay(batch: int) -> None:
    """Prevents decoding that is slower with drafts than without them, at any batch size."""
    verified, speed = simulate(DraftBudget(costs(0.3, 0.4)), [[0.1] * 8] * batch)
    assert sum(max(counts) > 0 for counts in verified[50:]) <= 24  # probes
    assert speed > 0.97 * batch / (1 + 0.3 * (batch - 1))


def test_probes_become_rare_if_no_draft_is_accepted() -> None:
    """Prevents probes from costing as much as turning drafts off saves."""
    verified, _ = simulate(DraftBudget(costs(0.3, 0.4)), [[0.0] * 8], 4000)
    early, late = (sum(counts[0] > 0 for counts in part) for part in (verified[10:1010], verified[3000:]))
    assert 0 < late < early / 2


def test_drafting_resumes_when_drafts_are_accepted_again() -> None:
    """Prevents drafting from staying off permanently after one passage with low acceptance."""
    budget = DraftBudget(costs(0.05, 0.1))
    simulate(budget, [[0.0] * 8], 400)
    verified, _ = simulate(budget, [[0.95] * 8], 1200)
    assert sum(counts[0] for counts in verified[600:]) / 600 > 3


def test_drafts_go_to_the_sequences_that_accept_them() -> None:
    """Prevents a budget that is divided equally: elsewhere, hopeless drafts of one request slow down all others."""
    rates = [[0.95] * 8, [0.95] * 8, [0.05] * 8, [0.05] * 8]
    verified, _ = simulate(DraftBudget(costs(0.15, 0.02)), rates)
    means = [sum(counts[i] for counts in verified[300:]) / 300 for i in range(4)]
    assert min(means[:2]) > 1.5 and max(means[2:]) < 0.3


def test_a_larger_batch_gets_fewer_drafts() -> None:
    """Prevents drafts that cost more than they bring once the processor is busy: full calls get dearer by the token."""
    model = CostModel(((1, 1.0), (8, 1.1), (16, 1.5), (64, 6.0)), ((1, 0.05), (64, 0.3)))
    means = []
    for batch in (1, 4, 16, 48):
        verified, speed = simulate(DraftBudget(model), [[0.7] * 8] * batch, 300)
        means.append(sum(sum(counts) for counts in verified[150:]) / 150 / batch)
        assert speed > 0.97 * batch / model.full_call(batch)
    assert all(more > fewer - 0.01 for more, fewer in pairwise(means)), "apart from probes"
    assert means[0] > 2 > 0.5 > means[-1]


def test_fixed_numbers_of_drafts_are_kept() -> None:
    """Prevents --draft-tokens from being overruled, and drafts beyond the last token that is allowed."""
    budget = DraftBudget(costs(5.0, 5.0))
    candidates = [Candidate(0, (0.1,) * 3, 3, 100), Candidate(1, (0.9,) * 8, 8, 2), Candidate(2, (), 0, 9)]
    assert budget.verify(candidates) == [[1, 2, 3], [1, 2], []]
    assert budget.active, "nothing was decided about adaptive ones"


def test_the_best_number_is_found_beyond_a_step_of_the_costs() -> None:
    """Prevents a budget that stops at the first drop: a full call gets dearer where its products take another round, and
    more drafts are then free again."""
    model = CostModel(((1, 1.0), (4, 1.0), (5, 1.9), (17, 1.9)), ((1, 0.05),))
    for confidence, expected in ((0.97, 8), (0.6, 3)):
        budget = DraftBudget(model)
        budget._probe = 0
        (nodes,) = budget.verify([Candidate(0, (confidence,) * 8, None, 100)])
        assert len(nodes) == expected


@given(
    parents=st.lists(st.integers(0, 40), max_size=30),
    draw=st.randoms(use_true_random=False),
    room=st.integers(0, 5),
    slope=st.sampled_from([0.0, 0.02, 0.2]),
)
def test_nodes_are_verified_with_their_parents(
    parents: list[int], draw: random.Random, room: int, slope: float
) -> None:
    """Prevents a node that cannot be accepted because its parent is not verified, one beyond the last token that is allowed,
    and more nodes than there is room for."""
    of = tuple(min(parent, node) for node, parent in enumerate(parents))
    confidences = tuple(draw.choice([0.0, 0.1, draw.random(), 1.0]) for _ in of)
    budget = DraftBudget(costs(slope, 0.01))
    nodes = budget.verify([Candidate(3, confidences, None, room, of, True)])[0]
    assert len(set(nodes)) == len(nodes) <= MAX_NODES
    for node in nodes:
        depth, parent = 1, of[node - 1]
        assert parent in (0, *nodes)
        while parent:
            depth, parent = depth + 1, of[parent - 1]
        assert depth <= room


def test_confidences_are_calibrated() -> None:
    """Prevents drafts that are verified at a loss because the module is surer than it should be, or left out because it is
    less sure; without observations a confidence is taken at its word."""
    calibration, draw = Calibration(), random.Random(1)
    assert calibration.chance(0.3) == pytest.approx(0.3) and calibration.chance(0.02) == pytest.approx(0.02)
    for _ in range(4000):
        calibration.observe([(0.85, draw.random() < 0.5), (0.05, draw.random() < 0.15)])
    assert calibration.chance(0.85) == pytest.approx(0.5, abs=0.15)
    assert calibration.chance(0.05) == pytest.approx(0.15, abs=0.1)
    assert calibration.chance(0.81) < calibration.chance(0.89), "within a class, a higher confidence counts for more"
    assert calibration.chance(0.3) == pytest.approx(0.3), "of another class"


def test_the_first_steps_draft_without_knowledge() -> None:
    """Prevents a budget that never learns the acceptance because it never drafts."""
    verified, _ = simulate(DraftBudget(costs(2.0, 2.0)), [[0.0] * 8], 4)
    assert [counts[0] for counts in verified][:3] == [0, START, START]


def test_acceptance_of_unseen_positions_follows_the_position_before() -> None:
    """Prevents a later position that was never reached from being rated better than an earlier one that fails."""
    budget = DraftBudget()
    for _ in range(60):
        budget.observe(Verified(0, (0.5,) * 4, (), (), 4, 1))
    estimates = budget.acceptance(0)
    assert estimates[0] < 0.1
    assert estimates == sorted(estimates, reverse=True)


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


def test_hardly_any_gain_is_no_reason_to_verify() -> None:
    """Prevents steps that verify drafts for a gain within the error of the estimates: batches of 16 became slower."""
    for seconds, verified in ((1.045, 0), (1.025, 1)):  # 1.1 and 3.1 % more tokens per second
        budget = DraftBudget(CostModel(((1, 1.0), (16, 1.0), (17, seconds), (64, 4.0)), ((1, 1e-6), (64, 1e-6))))
        budget._probe = 0  # not the first steps, which draft to learn
        candidates = [Candidate(0, (0.9,), None, 10), *(Candidate(i, (), None, 10) for i in range(1, 16))]
        assert sum(map(len, budget.verify(candidates))) == verified


@pytest.mark.parametrize("batch", [1, 16])
def test_repeated_text_is_tried_again_one_draft_deep(batch: int) -> None:
    """Prevents eight tokens that a batch verifies in vain each time a text that repeats itself badly is tried again, and a
    larger batch that never tries again, where a single draft cannot gain much."""
    budget = DraftBudget(costs(slope=0.3, module=0.01))
    chain, kept = tuple([0.9] * 8), []
    others = [Candidate(i, (), None, 100) for i in range(1, batch)]
    for _ in range(200):
        nodes = budget.verify([Candidate(0, chain, None, 100, repeated=range(1, 9)), *others])[0]
        kept.append(0 if budget._probing else len(nodes))
        if nodes:
            confidences = chain[: len(nodes)]
            budget.observe(
                Verified(0, confidences, (), (), 0, 1, repeated=[True] * len(nodes), of_module=[False] * len(nodes))
            )
    late = kept[100:]
    assert max(late) == 1 and sum(late) >= 2, "it is tried, and by one draft at a time"


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
