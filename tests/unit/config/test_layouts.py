"""Impossible layouts are rejected before anything is built, in one line with the numbers and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.config import ConfigError, load_config, resolve_deepspeed
from tests.runs import ROOT, zero
from tests.unit.config.test_config import of_init_from

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
        (["parallel.pipeline=9"], ["parallel.pipeline (9)", "exceeds model.layers (4)", "lower it"]),
        (["parallel.tensor=2", "model.hidden=63", "model.head_dim=16"], ["model.hidden (63)", "parallel.tensor (2)"]),
        (["parallel.ulysses=2", "parallel.tensor=2"], ["ulysses (2)", "tensor=2", "combine it with ZeRO"]),
        (["parallel.ulysses=2", "parallel.pipeline=2"], ["ulysses (2)", "pipeline=2", "combine it with ZeRO"]),
    ],
)
def test_sizes_that_do_not_divide(overrides: list[str], parts: list[str]) -> None:
    """Prevents a degree that splits a head from failing late with a shape error, or not at all."""
    with pytest.raises(ConfigError) as caught:
        load_config(
            RUNS / "demo.yaml", ["model.heads=4", "model.kv_heads=2", "model.hidden=64", "model.layers=4", *overrides]
        )
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([f"deepspeed={zero(2)}"], ["ZeRO 2", "parallel.pipeline=2", "pipeline.json"]),
        ([f"deepspeed={zero(3)}"], ["ZeRO 3", "parallel.pipeline=2", "pipeline.json"]),
        (
            [f"deepspeed={zero('1_offload')}"],
            ["offload_optimizer", "parallel.pipeline=2", "tied embedding", "pipeline.json", "parallel.tensor"],
        ),
        (["training.compile=true"], ["training.compile=true", "parallel.pipeline=2"]),
    ],
)
def test_settings_that_do_not_work_with_a_pipeline(overrides: list[str], parts: list[str]) -> None:
    """Prevents combinations that DeepSpeed's pipeline engine computes wrongly, or that hang in the first step."""
    config = load_config(RUNS / "demo.yaml", ["parallel.pipeline=2", f"deepspeed={PIPELINE}", *overrides])
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed(config, 1)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_zero_0_in_bf16_is_rejected_before_anything_is_read(axis: str) -> None:
    """Prevents wrong gradients, and an error that comes only after the data have been prepared."""
    sizes = ["model.heads=4", "model.kv_heads=2", "model.hidden=64"]
    overrides = [f"deepspeed={zero(0)}", f"parallel.{axis}=2", "training.dtype=bf16"]
    with pytest.raises(ConfigError, match=rf"ZeRO 0 with training.dtype=bf16 at .*parallel.{axis}=2.* wrong gradients"):
        resolve_deepspeed(load_config(RUNS / "demo.yaml", sizes + overrides), 1)
    for allowed in (overrides[:2], overrides[::2]):
        resolve_deepspeed(load_config(RUNS / "demo.yaml", sizes + allowed), 1)


def test_without_a_module_the_hidden_width_is_not_split() -> None:
    """Prevents rejecting a model for a size that its layout does not split."""
    sizes = ["model.heads=4", "model.kv_heads=2", "model.hidden=63", "model.head_dim=16", "recycle.layers=0"]
    assert load_config(RUNS / "demo.yaml", ["parallel.tensor=2", *sizes]).model.hidden == 63


@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.glob("*.yaml")))
def test_shipped_runs_have_a_layout(name: str) -> None:
    """Prevents a preset whose own layout is rejected."""
    config = load_config(RUNS / name, (), of_init_from)
    parallel = config.parallel
    assert Path(ROOT / config.deepspeed).exists()
    assert resolve_deepspeed(config, 1)["train_batch_size"] == config.training.global_batch_size * parallel.ulysses
