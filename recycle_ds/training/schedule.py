"""Learning rate and recycle-loss weight as pure functions of the step, so that resuming needs no schedule state."""

from __future__ import annotations

import math

from recycle_ds.config import RecycleConfig, TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Linear warm-up to the peak, then cosine decay to `min_learning_rate_ratio` of it (Loshchilov and Hutter, arXiv 1608.03983),
    or warm-up, stable, linear decay (wsd; Hu et al., arXiv 2404.06395), or a constant.
    """
    peak = config.learning_rate
    floor = peak * config.min_learning_rate_ratio
    warmup = min(config.warmup_steps, config.steps)
    if step <= warmup:
        return peak * step / warmup
    if config.schedule == "constant":
        return peak
    if config.schedule == "wsd":
        decay = config.decay_steps if config.decay_steps is not None else max(1, config.steps // 10)
        start = max(warmup, config.steps - decay)
        return peak if step <= start else peak + (floor - peak) * (step - start) / max(1, config.steps - start)
    progress = (step - warmup) / max(1, config.steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def recycle_weight(step: int, config: RecycleConfig) -> float:
    """Lambda at optimizer step `step`: 0 through start_step, then a linear rise over warmup_steps to loss_weight."""
    if step <= config.start_step:
        return 0.0
    if config.warmup_steps == 0:
        return config.loss_weight
    return config.loss_weight * min(1.0, (step - config.start_step) / config.warmup_steps)


def loss_weights(step: int, config: RecycleConfig) -> list[float]:
    """Weight of each loss in the total, the backbone's first: 1, then lambda w_k / sum w with w_k = depth_decay^(k-1), or
    those of step_weights.

    A frozen backbone's own loss is reported but has weight 0.
    """
    backbone = 0.0 if config.gradient == "frozen_backbone" else 1.0
    if config.layers == 0:
        return [backbone]
    shares = config.step_weights or [config.depth_decay**k for k in range(config.depth)]
    weight = recycle_weight(step, config)
    return [backbone] + [weight * share / sum(shares) for share in shares]
