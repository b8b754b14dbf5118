"""A forward and backward pass before step 1 that leaves no trace, so that running out of memory shows at once."""

from __future__ import annotations

import torch

from recycle_ds.training.batches import StepBatches
from recycle_ds.training.engine import TrainingEngine
from recycle_ds.training.errors import TrainingError


def dry_run(engine: TrainingEngine, batches: StepBatches, scales: torch.Tensor) -> None:
    """Runs one micro-batch outside DeepSpeed's bookkeeping. Raises TrainingError on the ranks whose memory does not suffice.

    autograd.grad walks the same graph as backward() but accumulates nothing, so no gradient, counter or reduction bucket
    changes; generators are put back. Under ZeRO 2 and 3 the gradient of the first trainable weight alone is asked for:
    the graph is
    walked to its end, but holding all gradients would need memory that the real step does not.
    """
    try:
        _walk(engine, batches, scales)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(
            f"one micro-batch does not fit into memory ({' '.join(str(error).split())[:200]}): lower "
            "training.micro_batch_size or training.loss_chunk, or set training.activation_checkpointing=full"
        ) from None


def _walk(engine: TrainingEngine, batches: StepBatches, scales: torch.Tensor) -> None:
    devices = [batches.counts.device] if batches.counts.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        total, _ = engine.engine.module(batches.micro[0], scales)
        trainable = [p for p in engine.model.parameters() if p.requires_grad]
        wanted = trainable if engine.zero_stage < 2 else trainable[:1]
        torch.autograd.grad(total, wanted, allow_unused=True)
