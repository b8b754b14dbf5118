"""Bytes that one rank sends in an optimizer step, by kind. A ring moves (n - 1) / n of a tensor for each gather or scatter."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from recycle_ds.config import RunConfig
from recycle_ds.planning.candidates import Candidate
from recycle_ds.planning.memory import LocalWeights, reduces_in_fp32
from recycle_ds.planning.settings import Settings, read_settings


@dataclass(frozen=True)
class Communication:
    """Bytes per rank and step."""

    tensor: float
    """Residual streams between the tensor-parallel products."""
    ulysses: float
    """Queries, keys, values and attention's output, between a part of the sequence and a part of the heads."""
    pipeline: float
    """Activations and their gradients between stages."""
    gradients: float
    """Reduction over the replicas."""
    weights: float
    """Updated weights after the step (ZeRO 1, 2), or gathered for every pass (ZeRO 3)."""

    @property
    def total(self) -> float:
        """All kinds."""
        return sum(asdict(self).values())


def communication(
    config: RunConfig,
    candidate: Candidate,
    blocks: int,
    weights: LocalWeights,
    *,
    last: bool,
    settings: Settings | None = None,
) -> Communication:
    """What a rank of a stage with `blocks` blocks sends. settings: those of the run's DeepSpeed file, read if not given."""
    known = settings or read_settings(config.deepspeed)
    training = config.training
    element = 2 if training.dtype == "bf16" else 4
    micro_batches = candidate.micro_batches(config)
    stream = element * candidate.micro_batch_size * training.seq_length * config.model.hidden
    return Communication(
        tensor=micro_batches * _tensor(config, candidate, blocks, last=last) * stream,
        ulysses=micro_batches * _ulysses(config, candidate, blocks) * element,
        pipeline=_pipeline(candidate, last=last) * micro_batches * stream,
        gradients=_gradients(
            candidate, weights, 4 if reduces_in_fp32(config, candidate, known) else element, micro_batches
        ),
        weights=_weights(candidate, weights, element, micro_batches),
    )


def _ring(size: int) -> float:
    return (size - 1) / size


def _tensor(config: RunConfig, candidate: Candidate, blocks: int, *, last: bool) -> float:
    """Streams sent for one micro-batch: two sums a block forward and two backward (Megatron-LM, arXiv 1909.08053).

    A sum is a reduce-scatter and an all-gather, with sequence parallelism too, only that those lie apart. Recomputation sends
    the forward ones again; sequence parallelism gathers each product's input once more in backward.
    """
    size = candidate.layout.tensor
    if size == 1:
        return 0.0
    recycle = config.recycle
    passes = blocks + (recycle.layers * recycle.depth + recycle.depth if last else 0)
    sums = 4 + (2 if candidate.recompute == "full" else 0)
    gathers = 2 if candidate.sequence else 0
    head = (1 + (recycle.depth if recycle.layers else 0)) if last else 0
    return _ring(size) * (passes * (2 * sums + gathers) + 2 * head)


def _ulysses(config: RunConfig, candidate: Candidate, blocks: int) -> float:
    """Elements sent for one micro-batch: all four tensors forward, and their gradients back (arXiv 2309.14509, section 3)."""
    size = candidate.layout.ulysses
    if size == 1:
        return 0.0
    model, recycle = config.model, config.recycle
    width = 2 * (model.heads + model.kv_heads) * model.dim_per_head
    tokens = candidate.micro_batch_size * config.training.seq_length / size
    passes = 3 if candidate.recompute == "full" else 2
    return _ring(size) * (blocks + recycle.layers * recycle.depth) * passes * tokens * width


def _pipeline(candidate: Candidate, *, last: bool) -> float:
    stages = candidate.layout.pipeline
    if stages == 1:
        return 0.0
    share = 1 / candidate.layout.tensor if candidate.sequence else 1.0
    # a stage in the middle sends activations on and gradients back; the ends send one of them
    return share * (1 if last or stages == 2 else 2)


def _gradients(candidate: Candidate, weights: LocalWeights, element: int, micro_batches: int) -> float:
    """element: bytes of a gradient as it is sent."""
    size = element * weights.total * _ring(candidate.layout.replicas)
    # stages 0 and 1 reduce once a step (an all-reduce is two passes of the ring), 2 and 3 scatter in every micro-batch
    return size * (2 if candidate.zero_stage < 2 else micro_batches)


def _weights(candidate: Candidate, weights: LocalWeights, element: int, micro_batches: int) -> float:
    size = element * weights.total * _ring(candidate.layout.replicas)
    if candidate.zero_stage == 3:
        return size * micro_batches * (3 if candidate.recompute == "full" else 2)
    return size if candidate.zero_stage else 0.0
