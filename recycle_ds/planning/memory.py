"""Bytes that one rank holds at the peak of a step: after a backward pass, before gradients are reduced and freed.

What DeepSpeed 0.19.8 keeps per weight (e bytes in the model's type, r ranks that share its state):

    ZeRO 0, fp32      weight 4, gradient 4, moments 8
    ZeRO 1            weight e, gradient e until reduced, (master 4 + moments 8) / r
    ZeRO 1, summing   the same, plus an fp32 gradient 4
    ZeRO 2            weight e, gradient s / r, (master 4 + moments 8) / r
    ZeRO 3            the same / r, but small weights stay gathered on every rank

"Summing" marks bf16 runs that accumulate gradients in fp32 (`accumulates_in_fp32`, or the run's DeepSpeed file); s is 4 for
them and for fp32 runs, otherwise 2. From stage 1 on, fp32 runs have an fp32 master too (Rajbhandari et al., arXiv 1910.02054,
section 3). Building a model needs no more memory: weights are created on the device in the training dtype, and DeepSpeed
flattens them on the host if the device has no room. With a frozen backbone, gradients, master and moments are the module's
only. Tests compare these figures with the tensors that real runs hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from recycle_ds.config import ModelConfig, RecycleConfig, RunConfig
from recycle_ds.config.deepspeed_json import accumulates_in_fp32
from recycle_ds.model.stages import partition
from recycle_ds.planning.activations import CUDA, Activations, Kernels, is_frozen, padded_rows
from recycle_ds.planning.candidates import Candidate
from recycle_ds.planning.settings import Settings, read_settings

GIB = 2**30
# Elements of DeepSpeed's all-reduce buffer when it accumulates fp32 gradients at stage 1; not configurable.
ALL_REDUCE = 5e8


@dataclass(frozen=True)
class LocalWeights:
    """Weights of one rank before ZeRO: elements of matrices and embeddings, and of small tensors (norms, biases)."""

    large: int
    small: int
    module: int = 0
    """Those of the recycle module: all that a frozen backbone leaves to train."""

    @property
    def total(self) -> int:
        """All weights."""
        return self.large + self.small


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    host: float = 0.0
    """Optimizer state in host memory; not part of the total."""

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.states + self.activations + self.logits + self.buffers


def local_weights(
    config: ModelConfig, recycle: RecycleConfig, tensor: int, blocks: int, ends: tuple[bool, bool]
) -> LocalWeights:
    """Weights of a stage with `blocks` blocks, vocabulary padding included. ends: whether it is the first, and the last."""
    first, last = ends
    query, kv = config.heads * config.dim_per_head, config.kv_heads * config.dim_per_head
    block = (config.hidden * (2 * query + 2 * kv) + 3 * config.hidden * config.ffn) // tensor
    small = 2 * config.hidden + ((query + 2 * kv) // tensor if config.qkv_bias else 0)
    small += 2 * config.dim_per_head if config.qk_norm else 0
    embedding = padded_rows(config, tensor) * config.hidden
    large_total, small_total = blocks * block, blocks * small
    module_large = module_small = 0
    if first or (last and (config.tied_embeddings or recycle.layers)):
        large_total += embedding
    if last:
        small_total += config.hidden
        large_total += 0 if config.tied_embeddings else embedding
        if recycle.layers:
            taps = len(recycle.taps)
            module_large = recycle.layers * block + (2 + taps) * config.hidden**2 // tensor
            module_small = recycle.layers * small + (3 + taps) * config.hidden
            module_small += config.hidden + 1 if recycle.confidence else 0
    return LocalWeights(large_total + module_large, small_total + module_small, module_large + module_small)


def stage_counts(config: RunConfig, stages: int) -> tuple[int, ...]:
    """Blocks of each pipeline stage."""
    return _stages(config.model, config.recycle, config.training.seq_length, stages)


@lru_cache(maxsize=256)
def _stages(config: ModelConfig, recycle: RecycleConfig, seq_length: int, stages: int) -> tuple[int, ...]:
    return tuple(len(part) for part in partition(config, recycle, seq_length, stages))


def stage_memory(
    config: RunConfig, candidate: Candidate, stage: int, kernels: Kernels = CUDA, settings: Settings | None = None
) -> Memory:
    """What a rank of pipeline stage `stage` holds. settings: of the run's DeepSpeed file, which is read if None."""
    training, layout = config.training, candidate.layout
    counts = stage_counts(config, layout.pipeline)
    last = stage == layout.pipeline - 1
    weights = local_weights(config.model, config.recycle, layout.tensor, counts[stage], (stage == 0, last))
    states = _states(config, weights, candidate, settings or read_settings(config.deepspeed))
    activations = activations_of(config, candidate, kernels)
    in_flight = min(layout.pipeline - stage, candidate.micro_batches(config))
    stream = activations.element * activations.tokens * config.model.hidden
    stream //= layout.tensor if candidate.sequence else 1
    buffers = states.buffers + activations.working_set()
    if layout.pipeline > 1:  # buffers for received and sent activations and gradients, for each micro-batch in flight
        buffers += (2 * max(2, in_flight) + 2) * stream
    return Memory(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=in_flight * activations.stage(counts[stage], last=last),
        logits=activations.logits(training.loss_chunk) if last else 0,
        buffers=buffers,
        host=states.host,
    )


def worst_stage(
    config: RunConfig, candidate: Candidate, kernels: Kernels = CUDA, settings: Settings | None = None
) -> tuple[int, Memory]:
    """The pipeline stage that needs the most memory, and its memory. settings: see `stage_memory`."""
    known = settings or read_settings(config.deepspeed)
    found = {
        stage: stage_memory(config, candidate, stage, kernels, known) for stage in range(candidate.layout.pipeline)
    }
    stage = max(found, key=lambda number: found[number].total)
    return stage, found[stage]


def activations_of(config: RunConfig, candidate: Candidate, kernels: Kernels = CUDA) -> Activations:
    """The activation counts of a candidate."""
    training, layout = config.training, candidate.layout
    return Activations(
        config.model,
        config.recycle,
        candidate.micro_batch_size,
        training.seq_length // layout.ulysses,
        2 if training.dtype == "bf16" else 4,
        tensor=layout.tensor,
        sequence=candidate.sequence,
        ulysses=layout.ulysses,
        recompute=candidate.recompute == "full",
        kernels=kernels,
    )


def sums_in_fp32(config: RunConfig, candidate: Candidate, settings: Settings) -> bool:
    """Whether a bf16 run accumulates gradients in fp32: as the DeepSpeed file sets it, otherwise as training decides."""
    dtype, stage = config.training.dtype, candidate.zero_stage
    if settings.grad_accum_dtype is not None and stage:
        return dtype == "bf16" and settings.grad_accum_dtype == "fp32"
    return accumulates_in_fp32(stage, dtype, candidate.layout.pipeline, candidate.micro_batches(config))


def reduces_in_fp32(config: RunConfig, candidate: Candidate, settings: Settings) -> bool:
    """Whether a bf16 run also reduces gradients in fp32: the optimizer that DeepSpeed uses at stage 1 without offload does."""
    return candidate.zero_stage == 1 and not candidate.offload and sums_in_fp32(config, candidate, settings)


def _states(config: RunConfig, weights: LocalWeights, candidate: Candidate, settings: Settings) -> Memory:
    """Weights, gradients, optimizer state and buckets, by ZeRO stage."""
    element = 2 if config.training.dtype == "bf16" else 4
    summing = sums_in_fp32(config, candidate, settings)
    stage, replicas = candidate.zero_stage, candidate.layout.replicas
    count = weights.module if is_frozen(config.recycle) else weights.total
    shared = count / replicas
    held: float = element * weights.total
    gradients: float = element * count
    optimizer, buckets = 12 * shared, element * settings.reduce_bucket_size
    summed = 4 if summing else element
    if stage == 0:
        # fp32: the weight is the master. bf16 (a single model rank): plus an fp32 master and gradient
        optimizer, buckets = 8 * count if element == 4 else 16 * count, 0.0
    elif stage < 3 and settings.overlap:
        buckets *= 2
    if stage == 1 and summing:
        gradients += 4 * count
        if reduces_in_fp32(config, candidate, settings):
            buckets = 4 * min(ALL_REDUCE, count)
    elif stage == 2:
        gradients = summed * shared
    elif stage == 3:
        persistent = weights.small * (1 - 1 / replicas)
        held = element * (weights.total / replicas + persistent)
        gradients = summed * shared
        buckets += element * min(_largest(config, candidate) + settings.kept_gathered, weights.total)
    host = 0.0
    if candidate.offload:
        host, optimizer = optimizer, 0.0
        if stage >= 2:
            host, gradients = host + gradients, 0.0
    return Memory(held, gradients, optimizer, 0.0, 0.0, buckets, host)


def _largest(config: RunConfig, candidate: Candidate) -> int:
    """Elements that ZeRO-3 gathers at once: the head's weight, gathered for the full pass, and the weight of one product."""
    model, tensor = config.model, candidate.layout.tensor
    return padded_rows(model, tensor) * model.hidden + 2 * model.hidden * model.ffn // tensor
