"""A forward and backward pass before step 1 that leaves no trace, so that running out of memory shows at once."""

from __future__ import annotations

import torch

from recycle_ds.training.batches import StepBatches
from recycle_ds.training.engine import TrainingEngine


def dry_run(engine: TrainingEngine, batches: StepBatches, scales: torch.Tensor) -> float:
    """Runs one micro-batch outside DeepSpeed's bookkeeping and returns its loss.

    autograd.grad walks the same graph as backward() but accumulates nothing, so no gradient, counter or reduction bucket
    changes; generators are put back. Under ZeRO 2 and 3 gradients are asked for the embedding alone: holding all of them would
    need memory that the real step does not.
    """
    devices = [batches.counts.device] if batches.counts.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        total, _ = engine.engine.module(batches.micro[0], scales)
        trainable = [p for p in engine.model.parameters() if p.requires_grad]
        wanted = trainable if engine.zero_stage < 2 else trainable[:1]
        torch.autograd.grad(total, wanted, allow_unused=True)
    return float(total.detach())
