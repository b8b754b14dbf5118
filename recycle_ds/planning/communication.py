"""Bytes that one rank sends in an optimizer step, by kind.

A ring all-gather or reduce-scatter over n ranks sends (n - 1) / n of a tensor per rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from recycle_ds.config import RunConfig
from recycle_ds.planning.candidates import Candidate
from recycle_ds.planning.memory import LocalWeights, reduces_in_fp32
from recycle_ds.planning.settings import Settings, read_settings


@dataclass(frozen=True)
class Communication:
    """Bytes that a rank sends per step."""

    tensor: float
    """Residual stream, around the tensor-parallel products."""
    ulysses: float
    """Queries, keys, values and attention's output, in the all-to-all between sequence and heads."""
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
    """What a rank of a stage with `blocks` blocks sends. settings: of the run's DeepSpeed file, which is read if None."""
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
    """Residual streams sent per micro-batch: two all-reduces per block in forward and two in backward (arXiv 1909.08053).

    An all-reduce is a reduce-scatter and an all-gather; sequence parallelism runs these two at different places. Recomputation
    repeats those of the forward pass; sequence parallelism gathers each product's input again in the backward pass.
    """
    size = candidate.layout.tensor
    if size == 1:
        return 0.0
    recycle = config.recycle
    passes = blocks + (recycle.layers * recycle.depth + recycle.depth if last else 0)
    all_reduces = 4 + (2 if candidate.recompute == "full" else 0)
    gathers = 2 if candidate.sequence else 0
    head = (1 + (recycle.depth if recycle.layers else 0)) if last else 0
    return _ring(size) * (passes * (2 * all_reduces + gathers) + 2 * head)


def _ulysses(config: RunConfig, candidate: Candidate, blocks: int) -> float:
    """Elements sent per micro-batch: all four tensors in forward, their gradients in backward (arXiv 2309.14509, section 3)."""
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
    # a stage sends activations forward and gradients backward, the last one only gradients, the first of two only activations
    return share * (1 if last or stages == 2 else 2)


def _gradients(candidate: Candidate, weights: LocalWeights, element: int, micro_batches: int) -> float:
    """element: bytes per element of a gradient when it is sent."""
    size = element * weights.total * _ring(candidate.layout.replicas)
    # ZeRO 0 and 1 all-reduce once per step (twice the bytes of a reduce-scatter), 2 and 3 reduce-scatter every micro-batch
    return size * (2 if candidate.zero_stage < 2 else micro_batches)


def _weights(candidate: Candidate, weights: LocalWeights, element: int, micro_batches: int) -> float:
    size = element * weights.total * _ring(candidate.layout.replicas)
    if candidate.zero_stage == 3:
        return size * micro_batches * (3 if candidate.recompute == "full" else 2)
    return size if candidate.zero_stage else 0.0
