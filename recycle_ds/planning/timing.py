"""Estimated time of a step from FLOPs, bytes and the pipeline bubble, used to rank layouts.

A step is a sum: matrix products at their rate, attention at its own, memory-bound kernels at a fraction of the memory bandwidth
(`kernels`), communication, the optimizer, and gaps between kernels. `Assumptions` has the constants.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from recycle_ds.config import RunConfig
from recycle_ds.model.flops import (
    attention_flops_per_token,
    block_flops_per_token,
    recycle_flops_per_token,
    tail_flops_per_token,
    training_flops_per_token,
)
from recycle_ds.planning.activations import is_frozen, padded_rows
from recycle_ds.planning.candidates import Candidate
from recycle_ds.planning.communication import Communication
from recycle_ds.planning.hardware import Cluster
from recycle_ds.planning.kernels import COMPILED, EAGER, FUNCTIONS, Kernels


@dataclass(frozen=True)
class Assumptions:
    """Fractions of the data sheets' figures that real kernels and links reach."""

    products: float = 0.70
    """Fraction of the peak FLOP/s, for wide matrix products: 67 % measured at a width of 1536 (see `kernels.SOURCE`)."""
    narrow: float = 64.0
    """Width per tensor rank at which a split product reaches half of `products`; wider ones come closer to it."""
    links: float = 0.75
    """Fraction of the bandwidth, for large messages."""
    hidden_gradients: float = 0.8
    """Fraction of gradient and weight traffic over the data axis that overlaps with computation, if DeepSpeed overlaps it."""
    memory: float = 0.8
    """Fraction of the memory bandwidth, for the optimizer and the logits: long contiguous passes."""
    gradient_bytes: float = 28.0
    """Bytes per weight and step that DeepSpeed moves besides the optimizer: buckets, flat partitions, casts, the norm."""
    gaps: float = 0.04
    """Time between kernels, as a fraction of the computation: 7 of 178 ms measured."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    products: float
    """Matrix products."""
    attention: float
    elementwise: float
    """Memory-bound kernels between them: norms, rotary embedding, SwiGLU, sums, copies, the losses' softmax."""
    gaps: float
    """Between kernels."""
    tensor: float
    """Tensor-parallel or Ulysses traffic, which does not overlap with computation."""
    pipeline: float
    data: float
    optimizer: float
    bubble: float
    """Fraction of the pipeline's time that a stage is idle: (p - 1) / (m + p - 1) for p stages and m micro-batches
    (Narayanan et al., arXiv 2104.04473)."""

    @property
    def total(self) -> float:
        """Seconds of the full step."""
        busy = self.products + self.attention + self.elementwise + self.gaps + self.tensor + self.pipeline
        return busy / (1 - self.bubble) + self.data + self.optimizer

    def seconds(self) -> dict[str, float]:
        """The parts, without the bubble."""
        return {name: value for name, value in asdict(self).items() if name != "bubble"}


def kernels_of(config: RunConfig, candidate: Candidate, *, cuda: bool = True) -> Kernels:
    """What training uses in a layout, see `training.compile`."""
    layout, setting = candidate.layout, config.training.compile
    if setting is False or (setting == "auto" and (not cuda or layout.pipeline > 1)):
        return EAGER
    return FUNCTIONS if layout.tensor > 1 or candidate.zero_stage == 3 else COMPILED


def step_time(
    config: RunConfig,
    candidate: Candidate,
    cluster: Cluster,
    counts: tuple[int, ...],
    sent: Communication,
    weights: int,
    assumptions: Assumptions | None = None,
    kernels: Kernels | None = None,
) -> StepTime:
    """Estimates one step. counts: blocks per stage. sent, weights: bytes sent and elements of the rank that sends the most.
    kernels: `kernels_of` the layout by default."""
    assumed, used = assumptions or Assumptions(), kernels or kernels_of(config, candidate)
    training, layout, gpu = config.training, candidate.layout, cluster.gpu
    micro_batches = candidate.micro_batches(config)
    tokens = training.global_batch_size * training.seq_length / layout.replicas
    width = config.model.ffn / layout.tensor
    peak = gpu.flops(training.dtype)
    rate = peak * assumed.products * width / (width + assumed.narrow)
    local = max(layout.tensor, layout.ulysses) <= cluster.gpus_per_node
    inside = gpu.node_bandwidth if local else gpu.network_bandwidth
    # traffic between stages and replicas stays inside a node only if the cluster has a single node
    across = gpu.node_bandwidth if cluster.nodes == 1 else gpu.network_bandwidth
    element = 2 if training.dtype == "bf16" else 4
    overlapped = assumed.hidden_gradients if candidate.zero_stage in (2, 3) else 0.0
    flops, attended, stage = _stage_flops(config, candidate, counts)
    products = tokens * (flops - attended) / layout.tensor / rate
    attention = tokens * attended / layout.tensor / (peak * used.attention)
    block, logits = _stage_bytes(config, candidate, stage, counts, used, element)
    elementwise = tokens / gpu.memory_bandwidth * (block / used.elementwise + logits / assumed.memory)
    return StepTime(
        products=products,
        attention=attention,
        elementwise=elementwise,
        gaps=assumed.gaps * (products + attention + elementwise),
        tensor=(sent.tensor + sent.ulysses) / (inside * assumed.links),
        pipeline=sent.pipeline / (across * assumed.links),
        data=(1 - overlapped) * (sent.gradients + sent.weights) / (across * assumed.links),
        optimizer=_optimizer(candidate, cluster, weights, element, assumed),
        bubble=(layout.pipeline - 1) / (micro_batches + layout.pipeline - 1),
    )


def _stage_flops(config: RunConfig, candidate: Candidate, counts: tuple[int, ...]) -> tuple[float, float, int]:
    """FLOPs per token on the most expensive stage, recomputation included, those of attention among them, and its number."""
    model, recycle, length = config.model, config.recycle, config.training.seq_length
    block, tail = block_flops_per_token(model, length), tail_flops_per_token(model, recycle, length)
    block_attention = attention_flops_per_token(model, length)
    tail_attention = recycle_flops_per_token(model, recycle, length, attention_only=True)
    repeated = _repeated(config, candidate)
    if candidate.layout.pipeline == 1:
        total = training_flops_per_token(model, recycle, length)
        total += counts[0] * block / 3 if candidate.recompute == "full" and not is_frozen(recycle) else 0.0
        return total, counts[0] * block_attention * repeated + tail_attention, 0
    stages = [(count * block * repeated, count * block_attention * repeated) for count in counts]
    stages[-1] = (stages[-1][0] + tail, stages[-1][1] + tail_attention)
    most = max(range(len(stages)), key=lambda number: stages[number][0])
    return *stages[most], most


def _repeated(config: RunConfig, candidate: Candidate) -> float:
    """Passes through the backbone's blocks, where forward and backward are one: recomputation adds a third."""
    if is_frozen(config.recycle):  # blocks run forward only
        return 1 / 3
    return 4 / 3 if candidate.recompute == "full" else 1.0


def _stage_bytes(
    config: RunConfig, candidate: Candidate, stage: int, counts: tuple[int, ...], used: Kernels, element: int
) -> tuple[float, float]:
    """Bytes per token that a stage's memory-bound kernels move: in blocks and module, and on logits."""
    model, recycle, tensor = config.model, config.recycle, candidate.layout.tensor
    block = used.block_bytes(model, element, tensor, sequence=candidate.sequence)
    recomputed = 1 + used.forward if candidate.recompute == "full" else 1.0
    blocks = counts[stage] * block * (used.forward if is_frozen(recycle) else recomputed)
    if stage < len(counts) - 1:
        return blocks, 0.0
    depth = recycle.depth if recycle.layers else 0
    # the join normalises and concatenates two states: some three quarters of the residual stream's passes in a block
    join = 0.75 * used.stream * element * model.hidden
    return (
        blocks + depth * (recycle.layers * block * recomputed + join),
        (1 + depth) * padded_rows(model, tensor) * used.logit_bytes(element),
    )


def _optimizer(candidate: Candidate, cluster: Cluster, weights: int, element: int, assumed: Assumptions) -> float:
    """Seconds of AdamW, which reads and writes master, moments and gradient (32 bytes per weight of this rank's partition), and
    of what DeepSpeed does to the gradients of all its weights."""
    share = weights / (candidate.layout.replicas if candidate.zero_stage else 1)
    bandwidth = cluster.gpu.memory_bandwidth * assumed.memory
    moved = weights * assumed.gradient_bytes / bandwidth
    if candidate.offload:  # gradients go to the host and weights come back; the host's memory has 100 GB/s
        return moved + share * (4 + element) / cluster.gpu.host_bandwidth + share * 32 / 100e9
    return moved + share * 32 / bandwidth
