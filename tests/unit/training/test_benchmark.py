"""The training benchmark at a size that takes seconds: figures, memory and errors."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from recycle_ds.config import RecycleConfig, load_config
from recycle_ds.model.flops import parameters, training_flops_per_token
from recycle_ds.training.benchmark.comparison import ratios
from recycle_ds.training.benchmark.subjects import BACKBONE, HUGGING_FACE, RECYCLE, llama_config
from tests.runs import ROOT

SMALL = [
    "model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128", "model.vocab_size=512",
    "training.seq_length=32", "training.micro_batch_size=2", "training.global_batch_size=4", "training.dtype=fp32",
]  # fmt: skip


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_training.py"), *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip


def test_report(tmp_path: Path) -> None:
    """Prevents figures that do not follow from the measured times, and subjects of different size."""
    path = tmp_path / "out" / "bench.json"
    done = bench("--config", "ds_configs/runs/bench_20m.yaml", *SMALL, "--steps", "3", "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    subjects, seconds = report["subjects"], report["seconds_per_step"]
    assert set(subjects) == set(seconds) == {BACKBONE, RECYCLE, HUGGING_FACE}
    assert subjects[BACKBONE]["parameters"] == subjects[HUGGING_FACE]["parameters"] < subjects[RECYCLE]["parameters"]
    config = load_config(ROOT / "ds_configs" / "runs" / "bench_20m.yaml", SMALL)
    assert report["ratios"] == ratios(config, seconds)
    assert report["ratios"]["module_flops"] > 1
    for name, one in subjects.items():
        assert len(seconds[name]) == 3
        assert one["tokens_per_second"] == pytest.approx(4 * 32 / statistics.median(seconds[name]))
        recycle = config.recycle if name == RECYCLE else RecycleConfig(layers=0)
        flops = training_flops_per_token(config.model, recycle, 32)
        assert one["model_flops_per_second"] == pytest.approx(one["tokens_per_second"] * flops)
        work = flops * 4 * 32
        shares = [
            work / took / rate for took, rate in zip(seconds[name], report["matmul_flops_per_second"], strict=True)
        ]
        assert one["share_of_matmul_rate"] == pytest.approx(statistics.median(shares))
        # fp32 under ZeRO 1: a weight, its master and two moments
        assert one["state_gib"] * 2**30 == pytest.approx(16 * one["parameters"], rel=0.01)
        assert one["peak_gib"] > one["state_gib"]
    for name in subjects:
        assert name in done.stdout
    assert "Hugging Face's tokens/s" in done.stdout


def test_zero_3_weights_are_counted(tmp_path: Path) -> None:
    """Prevents missing weights and state in the figures: ZeRO-3 leaves parameters of over 1e5 elements empty."""
    path = tmp_path / "bench.json"
    wide = ["model.hidden=256", "model.ffn=512", "deepspeed=ds_configs/deepspeed/zero3.json"]
    done = bench("--config", "ds_configs/runs/bench_20m.yaml", *SMALL, *wide, "--steps", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr
    config = load_config(ROOT / "ds_configs" / "runs" / "bench_20m.yaml", [*SMALL, *wide])
    for name, one in json.loads(path.read_text())["subjects"].items():
        recycle = config.recycle if name == RECYCLE else RecycleConfig(layers=0)
        assert one["parameters"] == parameters(config.model, recycle)
        # a partition, its master and moments, all on one rank; small weights count twice
        assert 15.9 < one["state_gib"] * 2**30 / one["parameters"] < 18
        assert one["peak_gib"] > one["state_gib"]


def test_ratios_are_computed_within_rounds() -> None:
    """Prevents a temporary slowdown, which affects all subjects of a round, from changing the ratios."""
    config = load_config(ROOT / "ds_configs" / "runs" / "bench_20m.yaml")
    found = ratios(config, {BACKBONE: [1.0, 10.0, 1.0], RECYCLE: [2.0, 20.0, 2.0], HUGGING_FACE: [3.0, 30.0, 3.0]})
    assert found["speed_over_huggingface"] == 3.0 and found["module_time"] == 2.0
    assert found["module_time_over_flops"] == pytest.approx(2.0 / found["module_flops"])


def test_hugging_faces_model_has_the_runs_shape() -> None:
    """Prevents a comparison with a model of another size."""
    from transformers import LlamaForCausalLM

    config = load_config(ROOT / "ds_configs" / "runs" / "bench_135m.yaml")
    model, llama = config.model, llama_config(config)
    assert (llama.hidden_size, llama.num_hidden_layers, llama.vocab_size) == (
        model.hidden,
        model.layers,
        model.vocab_size,
    )
    import torch

    with torch.device("meta"):
        count = sum(p.numel() for p in LlamaForCausalLM(llama).parameters())
    assert 130e6 < count < 140e6


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.tensor=2", "parallel.tensor (2)"),
        ("recycle.layers=0", "there is no module to measure"),
        ("training.seq_lenght=8", "did you mean training.seq_length?"),
    ],
)
def test_wrong_input_is_one_line(override: str, expected: str) -> None:
    """Prevents a traceback for a setting that the comparison does not support."""
    done = bench("--config", "ds_configs/runs/bench_20m.yaml", *SMALL, override)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert expected in errors[0] and "Traceback" not in done.stderr
