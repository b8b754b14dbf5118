"""Estimated time of a step from FLOPs, bytes and the pipeline bubble, used to rank layouts. `Assumptions` has the constants."""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.config import RunConfig
from recycle_ds.model.flops import block_flops_per_token, tail_flops_per_token, training_flops_per_token
from recycle_ds.planning.activations import is_frozen
from recycle_ds.planning.candidates import Candidate
from recycle_ds.planning.communication import Communication
from recycle_ds.planning.hardware import Cluster


@dataclass(frozen=True)
class Assumptions:
    """Fractions of the data sheets' figures that real kernels and links reach."""

    compute: float = 0.55
    """Fraction of the peak FLOP/s, for matrix products of a few thousand rows."""
    narrow: float = 512.0
    """Width per tensor rank at which a split product reaches half of `compute`; wider ones come closer to it."""
    links: float = 0.75
    """Fraction of the bandwidth, for large messages."""
    hidden_gradients: float = 0.8
    """Fraction of gradient and weight traffic over the data axis that overlaps with computation, if DeepSpeed overlaps it."""
    memory: float = 0.8
    """Fraction of the memory bandwidth, for the optimizer."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
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
        busy = self.compute + self.tensor + self.pipeline
        return busy / (1 - self.bubble) + self.data + self.optimizer


def step_time(
    config: RunConfig,
    candidate: Candidate,
    cluster: Cluster,
    counts: tuple[int, ...],
    sent: Communication,
    weights: int,
    assumptions: Assumptions | None = None,
) -> StepTime:
    """Estimates one step. counts: blocks per stage. sent, weights: bytes sent and elements of the rank that sends the most."""
    assumed = assumptions or Assumptions()
    training, layout, gpu = config.training, candidate.layout, cluster.gpu
    micro_batches = candidate.micro_batches(config)
    tokens = training.global_batch_size * training.seq_length / layout.replicas
    width = config.model.ffn / layout.tensor
    rate = gpu.flops(training.dtype) * assumed.compute * width / (width + assumed.narrow)
    local = max(layout.tensor, layout.ulysses) <= cluster.gpus_per_node
    inside = gpu.node_bandwidth if local else gpu.network_bandwidth
    # traffic between stages and replicas stays inside a node only if the cluster has a single node
    across = gpu.node_bandwidth if cluster.nodes == 1 else gpu.network_bandwidth
    element = 2 if training.dtype == "bf16" else 4
    overlapped = assumed.hidden_gradients if candidate.zero_stage in (2, 3) else 0.0
    optimizer = _optimizer(candidate, cluster, weights, element, assumed)
    return StepTime(
        compute=tokens * _stage_flops(config, candidate, counts) / layout.tensor / rate,
        tensor=(sent.tensor + sent.ulysses) / (inside * assumed.links),
        pipeline=sent.pipeline / (across * assumed.links),
        data=(1 - overlapped) * (sent.gradients + sent.weights) / (across * assumed.links),
        optimizer=optimizer,
        bubble=(layout.pipeline - 1) / (micro_batches + layout.pipeline - 1),
    )


def _stage_flops(config: RunConfig, candidate: Candidate, counts: tuple[int, ...]) -> float:
    """FLOPs per token on the most expensive stage, recomputation included."""
    length = config.training.seq_length
    block = block_flops_per_token(config.model, length)
    tail = tail_flops_per_token(config.model, config.recycle, length)
    if candidate.layout.pipeline == 1:
        total = training_flops_per_token(config.model, config.recycle, length)
        return total + (counts[0] * block / 3 if candidate.recompute == "full" else 0.0)
    recomputed = 4 / 3 if candidate.recompute == "full" else 1.0
    if is_frozen(config.recycle):  # blocks run forward only, and so does the head for the backbone's own loss
        recomputed = 1 / 3
    return max([count * block * recomputed for count in counts[:-1]] + [counts[-1] * block * recomputed + tail])


def _optimizer(candidate: Candidate, cluster: Cluster, weights: int, element: int, assumed: Assumptions) -> float:
    """Seconds of AdamW, which reads and writes master, moments and gradient: 32 bytes per weight of this rank's partition."""
    share = weights / (candidate.layout.replicas if candidate.zero_stage else 1)
    if candidate.offload:  # gradients go to the host and weights come back; the host's memory has 100 GB/s
        return share * (4 + element) / cluster.gpu.host_bandwidth + share * 32 / 100e9
    return share * 32 / (cluster.gpu.memory_bandwidth * assumed.memory)
