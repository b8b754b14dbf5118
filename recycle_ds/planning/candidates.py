"""The candidate layouts, and the reasons why some are impossible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from recycle_ds.config import RunConfig
from recycle_ds.config.deepspeed_json import OFFLOAD_IN_PIPELINE
from recycle_ds.parallel.layout import Layout
from recycle_ds.planning.hardware import Cluster


@dataclass(frozen=True)
class Candidate:
    """A layout with the settings that decide its memory use."""

    layout: Layout
    zero_stage: int
    micro_batch_size: int
    recompute: str
    """training.activation_checkpointing: "none" or "full"."""
    offload: bool
    """Optimizer state in host memory."""
    sequence: bool

    def micro_batches(self, config: RunConfig) -> int:
        """Micro-batches of a rank in one optimizer step."""
        return config.training.global_batch_size // (self.layout.data * self.micro_batch_size)

    def describe(self) -> dict[str, int | str | bool]:
        """The fields of the JSON report."""
        return {
            "tensor": self.layout.tensor,
            "pipeline": self.layout.pipeline,
            "data": self.layout.data,
            "ulysses": self.layout.ulysses,
            "sequence": self.sequence,
            "zero_stage": self.zero_stage,
            "micro_batch_size": self.micro_batch_size,
            "recompute": self.recompute,
            "offload": self.offload,
        }


def layouts(config: RunConfig, cluster: Cluster, *, ulysses: bool = False) -> Iterator[tuple[Layout, str]]:
    """Every TP x PP x DP of the cluster's GPUs, with the reason why it is impossible ("" if possible).

    A tensor group stays inside a node. With `ulysses` also every Ulysses degree x DP, inside a node and across nodes.
    """
    model = config.model
    for tensor in _divisors(cluster.gpus_per_node):
        for pipeline in _divisors(cluster.gpus // tensor):
            if pipeline > 4 * model.layers:
                continue  # far too many stages to be worth reporting
            layout = Layout(tensor, pipeline, cluster.gpus // (tensor * pipeline))
            yield layout, _layout_problem(config, layout)
    for degree in _divisors(cluster.gpus)[1:] if ulysses else ():
        if degree <= model.heads:
            layout = Layout(data=cluster.gpus // degree, ulysses=degree)
            yield layout, _layout_problem(config, layout)


def candidates(config: RunConfig, layout: Layout, *, offload: bool) -> Iterator[tuple[Candidate, str]]:
    """ZeRO stages, micro-batch sizes and recomputation of a possible layout, each with the reason if it is impossible."""
    sequence = layout.tensor > 1 and config.training.seq_length % layout.tensor == 0
    offloads = (False, True) if offload else (False,)
    for stage, offloaded in ((0, False), *product((1, 2, 3), offloads)):
        problem = _stage_problem(config, layout, stage, offload=offloaded)
        for micro in _micro_batches(config, layout):
            for recompute in ("none", "full"):
                yield Candidate(layout, stage, micro, recompute, offloaded, sequence), problem
            if problem:
                break  # the same for every micro-batch size


def _layout_problem(config: RunConfig, layout: Layout) -> str:
    model, training = config.model, config.training
    split = ("heads", "kv_heads", "ffn", *(("hidden",) if config.recycle.layers else ()))
    for name in split:
        size = getattr(model, name)
        if size % layout.tensor:
            return f"model.{name} ({size}) is not divisible by tensor {layout.tensor}"
    for name, size in (("heads", model.heads), ("kv_heads", model.kv_heads)):
        if size % layout.ulysses:
            return f"model.{name} ({size}) is not divisible by ulysses {layout.ulysses}"
    if training.seq_length % layout.ulysses:
        return f"training.seq_length ({training.seq_length}) is not divisible by ulysses {layout.ulysses}"
    if layout.pipeline > model.layers:
        return f"pipeline {layout.pipeline} exceeds model.layers ({model.layers})"
    if training.global_batch_size % layout.data:
        return f"training.global_batch_size ({training.global_batch_size}) is not divisible by data {layout.data}"
    return ""


def _stage_problem(config: RunConfig, layout: Layout, stage: int, *, offload: bool) -> str:
    if layout.pipeline > 1 and stage > 1:
        return f"ZeRO {stage} does not work with a pipeline: DeepSpeed partitions gradients that the pipeline still accumulates"
    if stage == 0 and config.training.dtype == "bf16" and layout.tensor * layout.pipeline > 1:
        return "ZeRO 0 in bf16 gives wrong gradients with tensor or pipeline parallelism in DeepSpeed"
    if offload and layout.pipeline > 1:
        return f"offload_optimizer does not work with a pipeline: {OFFLOAD_IN_PIPELINE}"
    if stage > 1 and layout.replicas == 1 and not offload:
        return "ZeRO has nothing to partition at data 1"
    return ""


def _micro_batches(config: RunConfig, layout: Layout) -> list[int]:
    per_rank = config.training.global_batch_size // layout.data
    return [size for size in (1, 2, 4, 8, 16) if per_rank % size == 0]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
