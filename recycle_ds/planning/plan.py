"""Ranks the layouts of a run on a cluster, and gives the reasons why others are rejected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from recycle_ds.config import RunConfig
from recycle_ds.model.flops import parameters, training_flops_per_token
from recycle_ds.planning.candidates import Candidate, candidates, layouts
from recycle_ds.planning.communication import Communication, communication
from recycle_ds.planning.hardware import Cluster
from recycle_ds.planning.memory import GIB, Memory, local_weights, stage_counts, worst_stage
from recycle_ds.planning.settings import Settings, read_settings
from recycle_ds.planning.timing import StepTime, step_time

# Usable share of device memory; the CUDA context, NCCL's buffers and fragmentation take the rest.
USABLE = 0.9


@dataclass(frozen=True)
class Plan:
    """A layout that fits, with its estimates."""

    candidate: Candidate
    memory: Memory
    """Of the rank that needs the most."""
    stage: int
    """The pipeline stage of that rank."""
    sent: Communication
    time: StepTime
    tokens_per_second: float
    mfu: float
    """Model FLOPs, without recomputation, over the peak of all GPUs."""

    def report(self) -> dict[str, object]:
        """The JSON entry. Memory in GiB, communication in bytes per rank and step, seconds."""
        held = {name: value / GIB for name, value in asdict(self.memory).items() if name != "host"}
        return {
            **self.candidate.describe(),
            "memory_gib": {**held, "total": self.memory.total / GIB},
            "host_memory_gib": self.memory.host / GIB,
            "fullest_stage": self.stage,
            "communication_bytes": asdict(self.sent),
            "bubble": self.time.bubble,
            "seconds": self.time.seconds(),
            "step_seconds": self.time.total,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
        }


@dataclass(frozen=True)
class Rejection:
    """A layout that is impossible or does not fit."""

    fields: dict[str, int | str | bool]
    reason: str

    def report(self) -> dict[str, object]:
        """The JSON entry."""
        return {**self.fields, "reason": self.reason}


@dataclass(frozen=True)
class Plans:
    """The result: layouts that fit, best first, and rejected ones."""

    parameters: int
    fitting: list[Plan]
    rejected: list[Rejection]


def make_plans(config: RunConfig, cluster: Cluster, *, offload: bool = True, ulysses: bool = False) -> Plans:
    """Plans every layout of the run on the cluster, with Ulysses layouts if requested. model.vocab_size must be set.

    Raises ConfigError when the run's DeepSpeed file, from which bucket sizes are taken, cannot be read.
    """
    fitting: list[Plan] = []
    rejected: list[Rejection] = []
    settings = read_settings(config.deepspeed)
    limit = USABLE * cluster.gpu.memory_gib * GIB
    for layout, problem in layouts(config, cluster, ulysses=ulysses):
        if problem:
            rejected.append(Rejection(asdict(layout), problem))
            continue
        for candidate, conflict in candidates(config, layout, offload=offload):
            if conflict:
                rejected.append(Rejection(candidate.describe(), conflict))
                continue
            stage, memory = worst_stage(config, candidate, settings=settings)
            if memory.total > limit:
                rejected.append(Rejection(candidate.describe(), _too_large(memory, cluster)))
            else:
                fitting.append(_plan(config, candidate, cluster, stage, memory, settings))
    return Plans(parameters(config.model, config.recycle), rank(fitting), rejected)


def rank(plans: Iterable[Plan]) -> list[Plan]:
    """Fastest first; among equals, the one that needs less memory first."""
    return sorted(plans, key=lambda plan: (-plan.tokens_per_second, plan.memory.total))


def _too_large(memory: Memory, cluster: Cluster) -> str:
    parts = {name: value for name, value in asdict(memory).items() if name != "host"}
    most = max(parts, key=lambda name: parts[name])
    return (
        f"needs {memory.total / GIB:.1f} GiB, more than {USABLE:.0%} of {cluster.gpu.memory_gib:g} GiB; "
        f"largest part: {most} ({parts[most] / GIB:.1f} GiB)"
    )


def _plan(
    config: RunConfig, candidate: Candidate, cluster: Cluster, stage: int, memory: Memory, settings: Settings
) -> Plan:
    training, layout = config.training, candidate.layout
    counts = stage_counts(config, layout.pipeline)
    sent = [
        communication(
            config,
            candidate,
            blocks,
            local_weights(config.model, config.recycle, layout.tensor, blocks, _ends(number, counts)),
            last=number == len(counts) - 1,
            settings=settings,
        )
        for number, blocks in enumerate(counts)
    ]
    busiest = max(range(len(sent)), key=lambda number: sent[number].total)
    weights = local_weights(config.model, config.recycle, layout.tensor, counts[busiest], _ends(busiest, counts)).total
    time = step_time(config, candidate, cluster, counts, sent[busiest], weights)
    tokens = training.global_batch_size * training.seq_length
    flops = tokens * training_flops_per_token(config.model, config.recycle, training.seq_length)
    peak = cluster.gpu.flops(training.dtype) * cluster.gpus
    return Plan(candidate, memory, stage, sent[busiest], time, tokens / time.total, flops / time.total / peak)


def _ends(number: int, counts: tuple[int, ...]) -> tuple[bool, bool]:
    return number == 0, number == len(counts) - 1
