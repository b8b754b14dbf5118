"""What `make demo` runs on, by the GPUs that are visible, and what its table and plots say about it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from recycle_ds.config import load_config
from recycle_ds.demo import CONFIG, Ranks, choose_ranks, described_devices, launch_command, rank_environment
from recycle_ds.inference.bench import plots
from recycle_ds.inference.bench.setting import described, host_threads
from recycle_ds.inference.bench.tables import results_table


@pytest.mark.parametrize(
    ("gpus", "overrides", "expected"),
    [
        (0, [], Ranks(2, on_gpus=False)),
        (1, [], Ranks(1, on_gpus=True)),
        (2, [], Ranks(2, on_gpus=True)),
        (8, [], Ranks(2, on_gpus=True)),  # two micro-batches in a step
        (8, ["training.global_batch_size=32"], Ranks(8, on_gpus=True)),
        (7, ["training.global_batch_size=24"], Ranks(6, on_gpus=True)),
        (5, ["parallel.tensor=2", "training.global_batch_size=32"], Ranks(4, on_gpus=True)),
        (1, ["parallel.tensor=2"], Ranks(2, on_gpus=False)),
    ],
)
def test_the_demo_uses_the_gpus_that_divide_its_batch(gpus: int, overrides: list[str], expected: Ranks) -> None:
    """Prevents training on the CPU beside an idle GPU, and a number of ranks that the batch refuses."""
    assert choose_ranks(gpus, load_config(CONFIG, overrides)) == expected


def test_ranks_get_the_devices_that_were_chosen() -> None:
    """Prevents ranks on the CPU that find a GPU, and ranks on GPUs that lose CUDA_VISIBLE_DEVICES."""
    given = {"CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin"}
    on_cpu = rank_environment(Ranks(2, on_gpus=False), given, 8)
    assert (on_cpu["CUDA_VISIBLE_DEVICES"], on_cpu["DS_ACCELERATOR"], on_cpu["OMP_NUM_THREADS"]) == ("", "cpu", "4")
    on_gpu = rank_environment(Ranks(1, on_gpus=True), given, 8)
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "3" and "DS_ACCELERATOR" not in on_gpu
    for number in (1, 2):
        shown, command = launch_command(Ranks(number, on_gpus=True), ["training.steps=3"])
        assert "deepspeed.launcher.runner" not in command and command[0] == sys.executable
        assert shown.endswith(f"-m recycle_ds.pretrain --config {CONFIG} training.steps=3")
        assert ("torchrun --nproc-per-node 2" in shown) == (number == 2)
    shown, command = launch_command(Ranks(2, on_gpus=False), [])
    assert shown == f"deepspeed --num_gpus 2 --module recycle_ds.pretrain --config {CONFIG}"
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"]


def test_the_devices_are_named() -> None:
    """Prevents a demo that does not say what it runs on."""
    assert described_devices([], 2) == "the CPU with 2 ranks"
    assert described_devices(["NVIDIA H100"], 1) == "one GPU (NVIDIA H100)"
    assert described_devices(["NVIDIA H100", "NVIDIA H100"], 2) == "2 GPUs (NVIDIA H100)"


def _report(threads: int | None, machine: str) -> dict[str, Any]:
    mode = {"tokens_per_second": 9.0, "speedup": 1.0, "tokens_per_full_call": 1.0, "acceptance": []}
    modes = {"autoregressive": mode | {"identical_to_autoregressive": True}}
    return {"modes": modes, "model": "runs/demo", "dtype": "fp32", "threads": threads, "machine": machine}


@pytest.mark.parametrize(
    ("device", "machine", "expected"),
    [
        ("cuda", "NVIDIA H100", "fp32, NVIDIA H100"),
        ("cpu", "AMD EPYC, 2 cores", "fp32, one thread, AMD EPYC, 2 cores"),
    ],
)
def test_labels_say_what_ran(device: str, machine: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents figures of a GPU under "one thread"."""
    report = _report(host_threads(torch.device(device)), machine)
    assert described(report) == expected
    assert f"({expected})" in str(results_table(report).title)
    titles: list[str] = []

    def stopped(path: object, title: str, subtitle: str) -> None:
        titles.append(subtitle)
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "two_panels", stopped)
    with pytest.raises(KeyboardInterrupt):
        plots.plot_decoding(report, "unused.png")  # type: ignore[arg-type]
    assert titles[0].replace("  ·  ", ", ") == f"runs/demo, {expected}"


def test_several_threads_are_counted() -> None:
    """Prevents a label that names one thread whatever was used."""
    assert described(_report(2, "a processor")) == "fp32, 2 threads, a processor"
