"""Schedules as functions of the step, and the loss weights by depth."""

from __future__ import annotations

from itertools import pairwise

import pytest

from recycle_ds.config import RecycleConfig, TrainingConfig
from recycle_ds.training.schedule import learning_rate, loss_weights, recycle_weight


def config(**changes: object) -> TrainingConfig:
    base = {"steps": 100, "micro_batch_size": 1, "global_batch_size": 1, "seq_length": 8, "learning_rate": 1.0}
    return TrainingConfig.model_validate(base | changes)


def test_cosine_with_warmup() -> None:
    """Prevents a warm-up that starts at zero or misses its peak, and a decay that does not end at the floor."""
    rates = [learning_rate(step, config(warmup_steps=10)) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(after <= before for before, after in pairwise(rates[9:]))


def test_wsd_holds_then_decays() -> None:
    """Prevents a stable phase that varies, and a decay of the wrong length."""
    rates = [learning_rate(step, config(schedule="wsd", warmup_steps=5, decay_steps=20)) for step in range(1, 101)]
    assert set(rates[4:80]) == {1.0}
    assert rates[89] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1)


def test_warmup_longer_than_the_run() -> None:
    """Prevents a short run from dividing by zero, or from staying at a vanishing rate."""
    assert learning_rate(5, config(steps=5, warmup_steps=50)) == 1.0
    assert learning_rate(1, config(steps=1)) > 0


def test_recycle_weight_starts_late_and_rises() -> None:
    """Prevents a recycle loss that counts before start_step, or jumps to its full weight."""
    recycle = RecycleConfig(loss_weight=0.4, start_step=10, warmup_steps=4)
    assert [recycle_weight(step, recycle) for step in (1, 10, 11, 12, 14, 99)] == pytest.approx(
        [0, 0, 0.1, 0.2, 0.4, 0.4]
    )


def test_depths_share_the_weight() -> None:
    """Prevents a total that grows with the depth: the weights of the depths sum to lambda and fall by depth_decay."""
    weights = loss_weights(50, RecycleConfig(depth=3, loss_weight=0.5, depth_decay=0.5))
    assert weights[0] == 1.0 and sum(weights[1:]) == pytest.approx(0.5)
    assert weights[1] / weights[2] == pytest.approx(2.0) == weights[2] / weights[3]
    assert loss_weights(50, RecycleConfig(layers=0)) == [1.0]
    assert loss_weights(50, RecycleConfig(gradient="frozen_backbone"))[0] == 0.0


def test_weights_of_the_steps_one_by_one() -> None:
    """Prevents listed weights that are ignored, not normalised, or fewer than the steps."""
    config = RecycleConfig(depth=3, loss_weight=0.5, step_weights=(3.0, 0.0, 1.0), gradient="frozen_backbone")
    assert loss_weights(50, config) == [0.0, 0.5 * 0.75, 0.0, 0.5 * 0.25]
    for wrong in ((1.0, 2.0), (0.0, 0.0, 0.0), (1.0, -1.0, 1.0)):
        with pytest.raises(ValueError, match="step_weights"):
            RecycleConfig(depth=3, step_weights=wrong)
