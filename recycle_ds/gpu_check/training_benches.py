"""The rates of the machine, and the speed of training: compared with Hugging Face's model, and of a larger shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER
from recycle_ds.checkpoint.portable.manifest import DataIdentity
from recycle_ds.checkpoint.run.saving import PortableCheckpointer
from recycle_ds.config import RunConfig, load_config, resolve_deepspeed
from recycle_ds.gpu_check.time_by_kind import milliseconds_by_kind
from recycle_ds.model.flops import training_flops_per_token
from recycle_ds.parallel import rendezvous
from recycle_ds.parallel.device import local_device, machine_name, matmul_rate, synchronise
from recycle_ds.parallel.mesh import Mesh, build_mesh
from recycle_ds.planning.hardware import Cluster, find_gpu
from recycle_ds.planning.plan import make_plans
from recycle_ds.training.benchmark.comparison import run_benchmark
from recycle_ds.training.benchmark.subjects import OurSubject
from recycle_ds.training.run_context import RunContext
from recycle_ds.training.state import TrainingState

Write = Callable[[dict[str, Any]], None]

_LENGTH, _MICRO_BATCH = 2048, 16
_COMPARED = [
    f"model.max_positions={_LENGTH}", f"training.seq_length={_LENGTH}", f"training.micro_batch_size={_MICRO_BATCH}",
    f"training.global_batch_size={_MICRO_BATCH}", "training.loss_chunk=8192",
]  # fmt: skip
_LARGE = ["training.micro_batch_size=4", "training.global_batch_size=4", "training.loss_chunk=8192",
          "deepspeed=ds_configs/deepspeed/zero1.json"]  # fmt: skip
_SMALL = [
    "model.layers=2", "model.hidden=64", "model.heads=4", "model.kv_heads=4", "model.ffn=128", "model.vocab_size=512",
    "recycle.layers=1", "training.seq_length=32", "training.micro_batch_size=2", "training.global_batch_size=2",
    "training.dtype=fp32",
]  # fmt: skip
_BYTES = 2**30
_SAVES = 4


def machine(write: Write, small: bool) -> None:
    """Rates of matrix products and of memory: what the shares in the other benches refer to."""
    device = local_device()
    write({"name": machine_name(device)})
    for dtype in ("bf16", "fp32"):
        write({f"matmul_{dtype}": matmul_rate(dtype, device)})
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        write({"matmul_tf32": matmul_rate("tf32", device)})
    write({"memory_bandwidth": _bandwidth(device, _BYTES // 256 if small else 4 * _BYTES)})


def _save(subject: OurSubject, folder: Path, device: torch.device) -> dict[str, float]:
    """What a checkpoint costs training that continues beside it, medians of some: seconds of a step, seconds that the loop
    waits, seconds of the step after it, and what both together are of a step."""
    (folder / TOKENIZER).write_text("{}", encoding="utf-8")
    checkpointer = PortableCheckpointer(subject.engine, DataIdentity(tokenizer="", train=[]))
    found: dict[str, list[float]] = {"step_seconds": [], "waited_seconds": [], "next_step_seconds": []}
    for number in range(1, 1 + _SAVES):
        plain = _seconds(subject.step, device)
        start = time.perf_counter()
        begun = checkpointer.begin(TrainingState(step=number))
        waited = time.perf_counter() - start
        after = _seconds(subject.step, device)
        assert begun and checkpointer.finish() is not None, f"nothing can be saved in {folder}"
        for name, value in zip(found, (plain, waited, after), strict=True):
            found[name].append(value)
    step, waited, after = (statistics.median(values) for values in found.values())
    share = (waited + max(after - step, 0.0)) / step
    return {"step_seconds": step, "waited_seconds": waited, "next_step_seconds": after, "share_of_step": share}


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - start


def _bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second that are read and written by copying `size` bytes, the best of several copies."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):
        synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def compared(write: Write, small: bool) -> None:
    """The 135 M shape, 16 x 2,048 tokens, bf16: with and without its module beside Hugging Face's, where a step's time goes,
    and what the planner expects."""
    config = load_config("bench_135m", _SMALL if small else _COMPARED)
    with _one_rank(config) as mesh:
        predicted = _predicted(config, mesh.device)
        # the report so far is written after every round: what has not ended in time is ended from outside
        report = run_benchmark(config, mesh, rounds=3 if small else 12, seconds_at_most=25, on_round=write)
        write(report)
        for name, step_seconds in predicted.items():
            measured = statistics.median(report["seconds_per_step"][name])
            write({f"planner_{name}": {"expected_seconds": step_seconds, "ratio": step_seconds / measured}})
        with TemporaryDirectory() as folder:
            data = config.data.model_copy(update={"tokenizer": folder})
            config = config.model_copy(update={"run_dir": folder, "data": data})
            subject = OurSubject(RunContext(config, resolve_deepspeed(config, 1), mesh))
            subject.step()
            write({"milliseconds_by_kind": milliseconds_by_kind(subject.step, mesh.device)})
            write({"save": _save(subject, Path(folder), mesh.device)})


def large(write: Write, small: bool) -> None:
    """The 1.3 B shape of the paper with its module: rate, share of the rate of matrix products, memory."""
    config = load_config("recyclegpt_1.3b", [*_LARGE, *(_SMALL if small else ["model.vocab_size=32000"])])
    with _one_rank(config) as mesh:
        subject, device = OurSubject(RunContext(config, resolve_deepspeed(config, 1), mesh)), mesh.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds, rates = [], []
        for number in range(3 if small else 10):
            rates.append(matmul_rate(config.training.dtype, device))
            synchronise(device)
            start = time.perf_counter()
            subject.step()
            synchronise(device)
            if number >= 2:  # the first steps compile, and create the optimizer's state
                seconds.append(time.perf_counter() - start)
        training = config.training
        tokens = training.global_batch_size * training.seq_length
        flops = training_flops_per_token(config.model, config.recycle, training.seq_length)
        rate = tokens / statistics.median(seconds)
        write({"tokens_per_second": rate, "share_of_matmul_rate": rate * flops / statistics.median(rates)})
        if device.type == "cuda":
            write({"peak_gib": torch.cuda.max_memory_allocated(device) / _BYTES})


def _predicted(config: RunConfig, device: torch.device) -> dict[str, float]:
    """The planner's seconds for a step on this card, by subject; empty for a card that it does not know."""
    name = machine_name(device).lower()
    known = next((gpu for part, gpu in _CARDS if part in name), None)
    if device.type != "cuda" or known is None:
        return {}
    plain = config.model_copy(update={"recycle": config.recycle.model_copy(update={"layers": 0, "depth": 1})})
    found = {}
    for subject, own in (("backbone", plain), ("recycle", config)):
        plans = make_plans(own, Cluster(1, 1, find_gpu(known)), offload=False).fitting
        chosen = [plan for plan in plans if _is_the_runs(plan.report(), config)]
        if chosen:
            found[subject] = chosen[0].time.total
    return found


_CARDS = (("h200", "h200"), ("h100", "h100"), ("b200", "b200"), ("l40s", "l40s"), ("a100", "a100-80"))


def _is_the_runs(report: dict[str, Any], config: RunConfig) -> bool:
    own = {"zero_stage": 1, "micro_batch_size": config.training.micro_batch_size, "offload": False}
    return all(report[key] == value for key, value in own.items()) and report["recompute"] == "none"


@contextmanager
def _one_rank(config: RunConfig) -> Iterator[Mesh]:
    """This process as the only rank."""
    launch = rendezvous.detect_launch({})
    rendezvous.start(launch)
    try:
        yield build_mesh(config.parallel, rendezvous.own_device(launch))
    finally:
        rendezvous.stop()
