"""Training speed of this model, with and without its module, next to Hugging Face's of the same shape, in one run.

All subjects train under DeepSpeed with the same settings, on the same tokens, in turns of a few steps: what slows the machine
down for a while slows all of them. Ratios are medians over the rounds, each against its own round.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from recycle_ds.config import RecycleConfig, RunConfig, resolve_deepspeed
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.model.flops import training_flops_per_token
from recycle_ds.parallel.device import matmul_rate, synchronise
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.batches import assemble
from recycle_ds.training.benchmark.live_memory import Held, PeakMemory, bytes_of, held_by
from recycle_ds.training.engine.build import build_engine
from recycle_ds.training.engine.optimizer import AdamW, parameter_groups
from recycle_ds.training.errors import TrainingError

LEAST_ROUNDS = 3
BACKBONE, RECYCLE, HUGGING_FACE = "backbone", "recycle", "huggingface"


class Subject(Protocol):
    """A model in its engine."""

    config: RunConfig
    """What it computes, for the FLOP count."""

    def step(self) -> None:
        """One optimizer step."""

    def held(self) -> Held:
        """What it keeps from step to step."""


@dataclass(frozen=True)
class Figures:
    """What was measured of a subject, on all ranks together but for memory, which is of this one."""

    parameters: int
    tokens_per_second: float
    model_flops_per_second: float
    share_of_matmul_rate: float
    """Of the rate of square matrix products in the same type, measured in the same round, of all ranks."""
    state_gib: float
    """Weights, fp32 masters and moments."""
    peak_gib: float
    """The same, and what a step holds at most beside them."""


class OurSubject:
    """RecycleGPT in its training engine."""

    def __init__(self, config: RunConfig, tree: dict[str, Any], mesh: Mesh, device: torch.device) -> None:
        self.config = config
        self._engine = build_engine(config, tree, mesh, device)
        depth = self._engine.model.depth
        self._batches = assemble(random_batches(config, mesh, depth), 1 + depth, mesh, device)
        weights = [1.0] + [config.recycle.loss_weight / max(1, depth)] * depth
        self._scales = self._batches.scales(weights, mesh.replicas.size)

    def step(self) -> None:
        """See `Subject`."""
        self._engine.passes.train(self._batches.micro, self._scales)
        self._engine.gradients.step(lambda _: True)

    def held(self) -> Held:
        """See `Subject`."""
        return held_by(self._engine.model, self._engine.optimizer, self._engine.engine.optimizer)


class HuggingFaceSubject:
    """transformers' LlamaForCausalLM of the same shape, under the same DeepSpeed settings and optimizer."""

    def __init__(self, config: RunConfig, tree: dict[str, Any], mesh: Mesh, device: torch.device) -> None:
        import deepspeed
        from transformers import LlamaForCausalLM

        self.config = config
        model = LlamaForCausalLM(llama_config(config))
        self._model = model.to(device)
        self._optimizer = AdamW(parameter_groups(self._model, config.training.weight_decay), config.training)
        self._engine, *_ = deepspeed.initialize(
            model=self._model, optimizer=self._optimizer, config=tree, dist_init_required=False
        )
        self._optimizer.hold = False
        self._tokens = [batch.tokens_BS.to(device) for batch in random_batches(config, mesh, 0)]

    def step(self) -> None:
        """See `Subject`."""
        for tokens in self._tokens:
            loss = self._engine(input_ids=tokens, labels=tokens, use_cache=False).loss
            self._engine.backward(loss)
            self._engine.step()

    def held(self) -> Held:
        """See `Subject`."""
        return held_by(self._model, self._optimizer, self._engine.optimizer)


def llama_config(config: RunConfig) -> Any:
    """The LlamaConfig of the run's backbone."""
    from transformers import LlamaConfig

    model = config.model
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.dim_per_head,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=model.tied_embeddings,
        attention_bias=model.qkv_bias,
        attn_implementation="sdpa",
    )


def random_batches(config: RunConfig, mesh: Mesh, depth: int) -> list[Batch]:
    """This rank's micro-batches of one step, of random tokens; every sequence is one document."""
    training = config.training
    assert config.model.vocab_size is not None
    generator = torch.Generator().manual_seed(training.seed + mesh.data.rank)
    batches = []
    for _ in range(training.global_batch_size // (training.micro_batch_size * mesh.data.size)):
        shape = (training.micro_batch_size, training.seq_length + 1)
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        targets = make_targets(tokens, torch.zeros_like(tokens), depth)
        positions = torch.arange(training.seq_length).expand(training.micro_batch_size, -1)
        documents = torch.zeros(training.micro_batch_size, training.seq_length, dtype=torch.int64)
        batches.append(Batch(targets.inputs[0], positions, documents, targets.inputs, targets.targets))
    return batches


def build_subjects(config: RunConfig, mesh: Mesh, device: torch.device) -> dict[str, Subject]:
    """The backbone alone, with its module, and Hugging Face's. Raises TrainingError for what these cannot share."""
    parallel = config.parallel
    if parallel.tensor * parallel.pipeline * parallel.ulysses > 1:
        raise TrainingError(
            f"parallel.tensor={parallel.tensor}, pipeline={parallel.pipeline}, ulysses={parallel.ulysses}: the comparison "
            "with Hugging Face runs data-parallel; set all three to 1"
        )
    if not config.recycle.layers:
        raise TrainingError("recycle.layers=0: there is no module to measure; set it to 1 or more")
    plain = config.model_copy(update={"recycle": RecycleConfig(layers=0)})
    makers: dict[str, tuple[Callable[..., Subject], RunConfig]] = {
        BACKBONE: (OurSubject, plain),
        RECYCLE: (OurSubject, config),
        HUGGING_FACE: (HuggingFaceSubject, plain),
    }
    return {
        name: maker(own, resolve_deepspeed(own, mesh.data.size), mesh, device) for name, (maker, own) in makers.items()
    }


def run_benchmark(
    config: RunConfig, mesh: Mesh, device: torch.device, *, rounds: int, seconds_at_most: float
) -> dict[str, Any]:
    """Times all subjects in turns, a step each, and returns the report. Collective over all ranks.

    Two steps of each before that are not timed: the first makes the optimizer's state, the second's memory is tracked. Rounds
    end early once `seconds_at_most` are over, but three are run, or fewer if fewer are asked for.
    """
    subjects = build_subjects(config, mesh, device)
    peaks = {name: _peak_of(subject, device) for name, subject in subjects.items()}
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    rates = []
    begun = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and _over(begun, seconds_at_most, mesh, device):
            break
        rates.append(matmul_rate(config.training.dtype, device) * mesh.world_size)
        for name, subject in subjects.items():
            seconds[name].append(_timed(subject.step, device))
    figures = {name: _figures(subject, seconds[name], rates, peaks[name]) for name, subject in subjects.items()}
    return {
        "subjects": {name: asdict(one) for name, one in figures.items()},
        "ratios": ratios(config, seconds),
        "seconds_per_step": seconds,
        "matmul_flops_per_second": rates,
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
    """Medians over rounds: speed against Hugging Face, and what the module costs in time and in FLOPs."""
    length = config.training.seq_length
    flops = training_flops_per_token(config.model, config.recycle, length)
    flops /= training_flops_per_token(config.model, RecycleConfig(layers=0), length)
    pairs = list(zip(seconds[BACKBONE], seconds[RECYCLE], seconds[HUGGING_FACE], strict=True))
    module = statistics.median(recycle / plain for plain, recycle, _ in pairs)
    return {
        "speed_over_huggingface": statistics.median(theirs / plain for plain, _, theirs in pairs),
        "module_time": module,
        "module_flops": flops,
        "module_time_over_flops": module / flops,
    }


def profile_subjects(config: RunConfig, mesh: Mesh, device: torch.device, rows: int = 12) -> dict[str, str]:
    """Per subject, the operations that take most of a step's time (torch.profiler)."""
    tables = {}
    for name, subject in build_subjects(config, mesh, device).items():
        subject.step()
        with torch.profiler.profile() as profiler:
            subject.step()
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        tables[name] = profiler.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=50)
    return tables


def _over(begun: float, limit: float, mesh: Mesh, device: torch.device) -> bool:
    """Whether the time is over by the first rank's clock: all ranks must run as many rounds."""
    over = torch.tensor(float(time.perf_counter() - begun > limit), device=device)
    if mesh.world_size > 1:
        torch.distributed.broadcast(over, 0)
    return bool(over)


def _timed(step: Callable[[], None], device: torch.device) -> float:
    synchronise(device)
    begun = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - begun


def _figures(subject: Subject, seconds: list[float], rates: list[float], peak: int) -> Figures:
    training = subject.config.training
    step = training.global_batch_size * training.seq_length
    per_token = training_flops_per_token(subject.config.model, subject.config.recycle, training.seq_length)
    tokens = step / statistics.median(seconds)
    held = subject.held()
    return Figures(
        parameters=held.parameters,
        tokens_per_second=tokens,
        model_flops_per_second=tokens * per_token,
        share_of_matmul_rate=statistics.median(
            step * per_token / took / rate for took, rate in zip(seconds, rates, strict=True)
        ),
        state_gib=bytes_of(held.state) / 2**30,
        peak_gib=(bytes_of(held.state + held.beside) + peak) / 2**30,
    )


def _peak_of(subject: Subject, device: torch.device) -> int:
    """Bytes that a step holds at most beyond what lasts: by the allocator on CUDA, by the tensors' storages on a CPU."""
    subject.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        subject.step()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as tracker:
        subject.step()
    return tracker.peak
