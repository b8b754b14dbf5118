"""A forward and backward pass before step 1 that changes no state, so that an out-of-memory error comes at once."""

from __future__ import annotations

import torch

from recycle_ds.data.loader import Batch
from recycle_ds.training.batches import StepBatches
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.errors import LocalError


def dry_run(engine: TrainingEngine, batches: StepBatches, scales: torch.Tensor) -> None:
    """Runs a micro-batch outside DeepSpeed's bookkeeping. Raises LocalError on ranks that run out of memory.

    autograd.grad walks the same graph as backward() but accumulates nothing, so no gradient, counter or reduction bucket
    changes; random generators are restored. A pipeline stage holds as many micro-batches at once as 1F1B keeps in flight, with
    zeros as the input from the previous stage. Under ZeRO 2 and 3 only the gradient of the first trainable weight is requested:
    autograd still walks the full graph, but holding all gradients would need memory that the real step does not.
    """
    try:
        _walk(engine, batches, scales)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise LocalError(
            f"one micro-batch does not fit into memory ({' '.join(str(error).split())[:200]}): lower "
            "training.micro_batch_size or training.loss_chunk, or set training.activation_checkpointing=full"
        ) from None


def _walk(engine: TrainingEngine, batches: StepBatches, scales: torch.Tensor) -> None:
    devices = [batches.counts.device] if batches.counts.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        outputs = [_forward(engine, batch, scales) for batch in _in_flight(engine, batches)]
        trainable = [p for p in engine.model.parameters() if p.requires_grad]
        requested = trainable if engine.zero.keeps_gradients else trainable[:1]
        for output in outputs if trainable else ():
            torch.autograd.grad(output, requested, allow_unused=True)


def _in_flight(engine: TrainingEngine, batches: StepBatches) -> list[Batch]:
    axis = engine.mesh.pipeline
    return batches.micro[: axis.size - axis.rank]


def _forward(engine: TrainingEngine, batch: Batch, scales: torch.Tensor) -> torch.Tensor:
    """The loss of a micro-batch, or the sum of a stage's output."""
    mesh, model = engine.mesh, engine.model
    if mesh.pipeline.size == 1:
        return model.train_losses(batch, scales)[0]
    received = None
    if not mesh.first_stage:
        weight = next(model.parameters())
        rows, length = batch.tokens_BS.shape
        length //= mesh.tensor.size if mesh.sequence else 1
        width = (1 + model.received_taps) * model.config.hidden
        received = torch.zeros(length, rows, width, dtype=weight.dtype, device=weight.device, requires_grad=True)
    if mesh.last_stage:
        return model.train_losses(batch, scales, received)[0]
    return model.run_stage(batch, received).sum()
