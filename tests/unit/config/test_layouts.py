"""Layouts that cannot work are refused before anything is built, in one line with the numbers and what to use instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.config import ConfigError, load_config, resolve_deepspeed
from tests.runs import ROOT, zero

RUNS = ROOT / "ds_configs" / "runs"
PIPELINE = str(ROOT / "ds_configs" / "deepspeed" / "pipeline.json")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel.tensor=5"], ["model.heads (4)", "parallel.tensor (5)"]),
        (["parallel.tensor=4"], ["model.kv_heads (2)", "parallel.tensor (4)"]),
        (["parallel.tensor=2", "model.ffn=255"], ["model.ffn (255)", "parallel.tensor (2)"]),
        (["parallel.ulysses=4"], ["model.kv_heads (2)", "parallel.ulysses (4)"]),
        (["parallel.ulysses=2", "training.seq_length=127"], ["training.seq_length (127)", "parallel.ulysses (2)"]),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "training.seq_length=127"],
            ["training.seq_length (127)", "parallel.tensor (2)", "when parallel.sequence is on"],
        ),
        (["parallel.ulysses=2", "parallel.tensor=2"], ["ulysses (2)", "tensor=2", "combine it with ZeRO"]),
        (["parallel.ulysses=2", "parallel.pipeline=2"], ["ulysses (2)", "pipeline=2", "combine it with ZeRO"]),
    ],
)
def test_sizes_that_do_not_divide(overrides: list[str], parts: list[str]) -> None:
    """A degree that cuts a head in two, found out by a shape error deep inside, or not at all."""
    with pytest.raises(ConfigError) as caught:
        load_config(RUNS / "demo.yaml", ["model.heads=4", "model.kv_heads=2", "model.hidden=64", *overrides])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([f"deepspeed={zero(2)}"], ["ZeRO 2", "parallel.pipeline=2", "pipeline.json"]),
        ([f"deepspeed={zero(3)}"], ["ZeRO 3", "parallel.pipeline=2", "pipeline.json"]),
        (["recycle.gradient=frozen_backbone"], ["frozen_backbone", "parallel.pipeline=2", "ZeRO 3"]),
        (["training.compile=true"], ["training.compile=true", "parallel.pipeline=2"]),
    ],
)
def test_what_does_not_go_with_a_pipeline(overrides: list[str], parts: list[str]) -> None:
    """A combination that DeepSpeed's pipeline engine accepts and computes wrongly, or that hangs in the first step."""
    config = load_config(RUNS / "demo.yaml", ["parallel.pipeline=2", f"deepspeed={PIPELINE}", *overrides])
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed(config, 1)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.glob("*.yaml")))
def test_shipped_runs_have_a_layout(name: str) -> None:
    """A preset whose own layout is refused."""
    config = load_config(RUNS / name)
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.ulysses
    assert Path(ROOT / config.deepspeed).exists()
    assert resolve_deepspeed(config, 1)["train_batch_size"] == config.training.global_batch_size * parallel.ulysses
    assert ranks >= 1
