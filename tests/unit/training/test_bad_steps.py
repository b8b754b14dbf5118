"""Detection of bad steps, and the response to them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.config import RunConfig
from recycle_ds.training.faults.bad_steps import APPLY, RETRY, ROLLBACK, SKIP, STOP, BadSteps, robust_score
from tests.runs import tiny_run

QUIET = [(3.0 + 0.01 * (n % 5), 1.0 + 0.02 * (n % 3)) for n in range(40)]


def config(**changes: Any) -> RunConfig:
    return tiny_run(Path("corpus"), Path("run"), **changes)


def judge(steps: BadSteps, loss: float, norm: float, rollbacks: int = 0, can_roll_back: bool = True) -> str:
    steps.begin(loss)
    steps.accept(norm)
    return steps.respond(rollbacks=rollbacks, can_roll_back=can_roll_back)


def test_robust_score_by_hand() -> None:
    """Prevents an earlier outlier from hiding a spike, and a drop from counting as one."""
    assert robust_score(7.0, [1.0, 2.0, 3.0, 4.0, 1000.0], 0.0) == pytest.approx((7 - 3) / 1.4826)
    assert robust_score(3.1, [3.0] * 20, 0.05) == pytest.approx(2.0)
    assert robust_score(-9.0, [3.0, 3.1, 2.9], 0.0) < 0


@given(st.lists(st.floats(0.5, 20), min_size=16, max_size=64), st.floats(0.1, 10), st.floats(0.5, 100))
def test_robust_score_is_scale_invariant(recent: list[float], scale: float, value: float) -> None:
    """Prevents a threshold that has another meaning for a loss of 3 than for a loss of 300."""
    plain = robust_score(value, recent, 0.01)
    assert robust_score(value * scale, [one * scale for one in recent], 0.01 * scale) == pytest.approx(
        plain, rel=1e-6, abs=1e-6
    )


@pytest.mark.parametrize(
    ("loss", "norm", "kind"),
    [(3.02, 1.02, None), (3.4, 1.0, "loss_spike"), (3.0, 3.0, "norm_spike"), (1.0, 0.1, None), (math.nan, 1.0, "nonfinite"),
     (3.0, math.inf, "nonfinite")],
)  # fmt: skip
def test_bad_steps_are_detected(loss: float, norm: float, kind: str | None) -> None:
    """Prevents a spike from being applied, or a normal step from being skipped."""
    steps = BadSteps(config(faults__spike="skip", training__nonfinite="skip"), QUIET)
    assert judge(steps, loss, norm) == (APPLY if kind is None else SKIP)
    assert (steps.fault.kind if steps.fault else None) == kind


def test_spike_detection_is_opt_in_and_needs_a_history() -> None:
    """Prevents the first steps of a run from being skipped, and spike detection that was not enabled."""
    assert judge(BadSteps(config(), QUIET), 30.0, 1.0) == APPLY
    short = BadSteps(config(faults__spike="skip"), QUIET[:15])
    assert judge(short, 30.0, 1.0) == APPLY
    assert BadSteps(config(), QUIET).recent == (), "nothing to keep in a checkpoint"


def test_a_step_that_was_never_judged_is_bad() -> None:
    """Prevents a step from being accepted if DeepSpeed returns before its norm is known."""
    steps = BadSteps(config(training__nonfinite="skip"))
    assert judge(steps, 3.0, 1.0) == APPLY
    steps.begin(3.0)
    assert steps.respond(rollbacks=0, can_roll_back=True) == SKIP


def test_retry_then_skip_then_stop() -> None:
    """Prevents endless retries of a bad batch, and endless skips."""
    steps = BadSteps(config(training__nonfinite="retry", training__max_skipped_in_a_row=2))
    assert [judge(steps, math.nan, 1.0) for _ in range(6)] == [RETRY, SKIP, RETRY, SKIP, RETRY, STOP]
    steps = BadSteps(config(training__nonfinite="retry"))
    assert [judge(steps, loss, 1.0) for loss in (math.nan, 3.0, math.nan, 3.0)] == [RETRY, APPLY, RETRY, APPLY]


def test_rollbacks_are_counted() -> None:
    """Prevents endless rollbacks, and a rollback without a checkpoint."""
    steps = BadSteps(config(training__nonfinite="rollback", faults__max_rollbacks=2))
    assert judge(steps, math.nan, 1.0, rollbacks=1) == ROLLBACK
    assert judge(steps, math.nan, 1.0, rollbacks=2) == STOP
    assert judge(steps, math.nan, 1.0, can_roll_back=False) == SKIP
    assert judge(BadSteps(config()), math.nan, 1.0) == STOP


def test_checkpointed_history_is_the_one_used() -> None:
    """Prevents a resumed run from using another history than the uninterrupted one."""
    steps = BadSteps(config(faults__spike="skip", faults__spike_window=16), QUIET)
    assert steps.recent == tuple(QUIET[-16:])
    steps.applied(9.0, 9.0)
    assert steps.recent == (*QUIET[-15:], (9.0, 9.0))
    steps.restart(QUIET[:3])
    assert steps.recent == tuple(QUIET[:3])
