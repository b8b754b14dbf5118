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
from recycle_ds.inference.speculation.decision import Decision
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


def test_hardly_any_gain_is_no_reason_to_verify() -> None:
    """Prevents steps that verify drafts for a gain within the error of the estimates: batches of 16 became slower."""
    for seconds, verified in ((1.045, 0), (1.025, 1)):  # 1.1 and 3.1 % more tokens per second
        budget = DraftBudget(CostModel(((1, 1.0), (16, 1.0), (17, seconds), (32, 1.3)), ((1, 1e-6), (64, 1e-6))))
        budget._probe = 0  # not the first steps, which draft to learn
        candidates = [Candidate(0, (0.9,), None, 10), *(Candidate(i, (), None, 10) for i in range(1, 16))]
        assert sum(map(len, budget.verify(candidates))) == verified


@pytest.mark.parametrize(("batch", "slope"), [(1, 0.3), (16, 0.02)])
def test_repeated_text_is_tried_again_one_draft_deep(batch: int, slope: float) -> None:
    """Prevents eight tokens that a batch verifies in vain each time a text that repeats itself badly is tried again, and a
    larger batch that never tries again, where a single draft cannot gain much."""
    budget = DraftBudget(costs(slope, module=0.01))
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


def test_where_no_draft_can_pay_none_is_looked_for() -> None:
    """Prevents batches of 32 that are a twentieth slower because the budget weighs drafts of which none can pay."""
    model = CostModel(((1, 1.0), (8, 1.2), (16, 2.0), (64, 8.0)), ((1, 0.05), (64, 0.3)))
    budget = DraftBudget(model)
    budget._probe = 0  # not the first steps, which draft to learn
    for batch, hopeless in ((1, False), (4, False), (32, True), (1, False)):
        chosen = budget.verify([Candidate(i, (0.999,) * 8, None, 100, repeated=range(1, 9)) for i in range(batch)])
        assert budget.hopeless == hopeless
        assert (sum(map(len, chosen)) == 0) == hopeless


def test_little_hope_is_no_reason_to_look() -> None:
    """Prevents batches that are slower for drafts of which the best ones pay by a trifle: with up to 1.5 times the tokens per
    second if all were accepted, what was verified gained or lost 5 %, and the host's work to find and weigh them was lost."""
    for seconds, hopeless in ((1.4, True), (1.3, False)):  # 43 and 54 % more tokens per second
        budget = DraftBudget(CostModel(((1, 1.0), (16, 1.0), (32, seconds), (64, 8.0)), ((1, 1e-6), (64, 1e-6))))
        budget._probe = 0
        budget.verify([Candidate(i, (0.999,), None, 10) for i in range(16)])
        assert budget.hopeless == hopeless


def test_probes_go_on_where_drafts_have_little_hope() -> None:
    """Prevents drafts that are made once in a while and dropped, in place of probes that tell what they are worth."""
    budget = DraftBudget(CostModel(((1, 1.0), (16, 1.0), (32, 1.4), (64, 8.0)), ((1, 0.01), (64, 0.01))))
    made: list[int] = [0] * 16
    probes = wasted = 0
    for step in range(600):
        chosen = budget.verify([Candidate(i, (0.9,) * count, None, 100) for i, count in enumerate(made)])
        for i, nodes in enumerate(chosen):
            if nodes:
                budget.observe(Verified(i, (0.9,) * len(nodes), (), (), len(nodes), 1))
        if step > 10:
            probes += any(chosen)
            wasted += any(made) and not any(chosen)
        made = [budget.draft(i) for i in range(16)]
    assert probes > 4 and wasted == 0
    assert budget._patience > 200


def test_probes_look_for_drafts_where_none_could_pay() -> None:
    """Prevents wrong costs of large batches from being kept for ever: steps that verify drafts are what corrects them."""
    budget = DraftBudget(CostModel(((1, 1.0), (64, 64.0)), ((1, 0.05),)))
    assert budget._probe > 0
    assert sum(map(len, budget.verify([Candidate(i, (0.9,) * 4, None, 100) for i in range(32)]))) > 0
    assert not budget.hopeless


def test_the_explanation_has_the_figures_of_the_decision() -> None:
    """Prevents an --explain that prints other numbers than those that the budget counted with."""
    budget = DraftBudget(CostModel(((1, 0.010), (11, 0.020)), ((1, 0.001), (11, 0.002))))
    budget.decision = Decision(sequences=2, adaptive=1, drafts=5, tokens=6, made_next=3, expected=3.456)
    assert budget.explanation == (
        "2 sequences: 4 of 5 drafts verified, trees at most 3 deep made next. Full call over 6 tokens 15.0 ms, over 2 11.0 ms; "
        "drafts of the first depth 1.0 ms, of a further one 1.0 ms; expected tokens 3.46"
    )
    chosen = budget.verify([Candidate(0, (0.9, 0.8), None, 1000), Candidate(1, (), 0, 1000)])
    decision = budget.decision
    assert decision is not None and (decision.sequences, decision.adaptive, decision.drafts) == (2, 1, 2)
    assert decision.tokens == 2 + len(chosen[0])
