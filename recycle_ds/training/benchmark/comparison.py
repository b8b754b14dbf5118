"""Training speed of this model, with and without its recycle module, compared with Hugging Face's of the same shape.

All subjects train in one process under DeepSpeed with the same settings, on the same tokens, in turns of one step, so that a
temporary slowdown of the machine affects all of them. Ratios are medians over rounds, each computed within one round.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from recycle_ds.config import RecycleConfig, RunConfig
from recycle_ds.model.flops import training_flops_per_token
from recycle_ds.parallel.device import matmul_rate, synchronise
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.benchmark.live_memory import PeakMemory, bytes_of
from recycle_ds.training.benchmark.subjects import BACKBONE, HUGGING_FACE, RECYCLE, Subject, build_subjects

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Figures:
    """Measurements of a subject. Speeds are totals over all ranks, memory is this rank's."""

    parameters: int
    tokens_per_second: float
    model_flops_per_second: float
    share_of_matmul_rate: float
    """Fraction of the rate of square matrix products in the same dtype, measured in the same round on all ranks."""
    state_gib: float
    """Weights, fp32 masters and moments."""
    peak_gib: float
    """The same, plus the most that a step allocates in addition."""


def raise_batch(config: RunConfig, ranks: int) -> RunConfig:
    """The configuration with a global batch of at least one micro-batch for each of `ranks` data-parallel ranks."""
    training = config.training
    least = training.micro_batch_size * ranks
    if training.global_batch_size >= least:
        return config
    return config.model_copy(update={"training": training.model_copy(update={"global_batch_size": least})})


def run_benchmark(
    config: RunConfig,
    mesh: Mesh,
    *,
    rounds: int,
    seconds_at_most: float,
    on_round: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Times all subjects in turns of one step and returns the report. Collective over all ranks.

    on_round: called with the report so far after each round that another may follow, for whoever may be ended before the last.

    Each subject first runs two untimed steps: the first creates the optimizer state, the second measures memory. Rounds stop
    early after `seconds_at_most`, but not before three rounds, or `rounds` if that is fewer.
    """
    device = mesh.device
    subjects = build_subjects(config, mesh)
    peaks = {name: _peak_of(subject, device) for name, subject in subjects.items()}
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    rates = []
    start = time.perf_counter()
    for number in range(rounds):
        if number >= MIN_ROUNDS and _time_is_up(start, seconds_at_most, mesh):
            break
        rates.append(matmul_rate(config.training.dtype, device) * mesh.world_size)
        for name, subject in subjects.items():
            seconds[name].append(_timed(subject.step, device))
        figures = {name: _figures(subject, seconds[name], rates, peaks[name]) for name, subject in subjects.items()}
        report = _report(config, mesh, figures, seconds, rates)
        if number < rounds - 1:
            on_round(report)
    return report


def _report(
    config: RunConfig, mesh: Mesh, figures: dict[str, Figures], seconds: dict[str, list[float]], rates: list[float]
) -> dict[str, Any]:
    device = mesh.device
    return {
        "subjects": {name: asdict(one) for name, one in figures.items()},
        "ratios": ratios(config, seconds),
        "seconds_per_step": {name: list(one) for name, one in seconds.items()},
        "matmul_flops_per_second": list(rates),
        "dtype": config.training.dtype,
        "seq_length": config.training.seq_length,
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.training.global_batch_size,
        "world_size": mesh.world_size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def ratios(config: RunConfig, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds: speed relative to Hugging Face, and the recycle module's cost in time and in FLOPs."""
    length = config.training.seq_length
    flops = training_flops_per_token(config.model, config.recycle, length)
    flops /= training_flops_per_token(config.model, RecycleConfig(layers=0), length)
    pairs = list(zip(seconds[BACKBONE], seconds[RECYCLE], seconds[HUGGING_FACE], strict=True))
    module = statistics.median(recycle / plain for plain, recycle, _ in pairs)
    return {
        "speed_over_huggingface": statistics.median(other / plain for plain, _, other in pairs),
        "module_time": module,
        "module_flops": flops,
        "module_time_over_flops": module / flops,
    }


def profile_subjects(config: RunConfig, mesh: Mesh, rows: int = 12) -> dict[str, str]:
    """Per subject, the operations that take most of a step's time (torch.profiler)."""
    tables = {}
    for name, subject in build_subjects(config, mesh).items():
        subject.step()
        with torch.profiler.profile() as profiler:
            subject.step()
        by = "self_cuda_time_total" if mesh.device.type == "cuda" else "self_cpu_time_total"
        tables[name] = profiler.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=50)
    return tables


def _time_is_up(start: float, limit: float, mesh: Mesh) -> bool:
    """Whether the first rank's clock is past the limit: all ranks must run the same number of rounds. Collective."""
    time_is_up = torch.tensor(float(time.perf_counter() - start > limit), device=mesh.device)
    if mesh.world_size > 1:
        torch.distributed.broadcast(time_is_up, 0)
    return bool(time_is_up)


def _timed(step: Callable[[], None], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def _figures(subject: Subject, seconds: list[float], rates: list[float], peak: int) -> Figures:
    training = subject.config.training
    tokens_per_step = training.global_batch_size * training.seq_length
    per_token = training_flops_per_token(subject.config.model, subject.config.recycle, training.seq_length)
    rate = tokens_per_step / statistics.median(seconds)
    persistent = subject.held()
    return Figures(
        parameters=persistent.parameters,
        tokens_per_second=rate,
        model_flops_per_second=rate * per_token,
        share_of_matmul_rate=statistics.median(
            tokens_per_step * per_token / duration / peak_rate
            for duration, peak_rate in zip(seconds, rates, strict=True)
        ),
        state_gib=bytes_of(persistent.state) / 2**30,
        peak_gib=(bytes_of(persistent.state + persistent.beside) + peak) / 2**30,
    )


def _peak_of(subject: Subject, device: torch.device) -> int:
    """Most bytes that a step allocates beyond the persistent tensors, by the allocator on CUDA, by tensor storages on CPU."""
    subject.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        subject.step()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as tracker:
        subject.step()
    return tracker.peak
