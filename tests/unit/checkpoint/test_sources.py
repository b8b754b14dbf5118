"""Differences between a source and a model that are accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.sources import check_tensors
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model import build_model
from recycle_ds.model.build import whole_shapes
from tests.unit.checkpoint.memory import ModelSource

CONFIG = ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=30, max_positions=16)


def source(layers: int) -> ModelSource:
    module = RecycleConfig(layers=layers, depth=2)
    return ModelSource(build_model(CONFIG, module, seed=1), CONFIG, module, Path("models/one"))


@pytest.mark.parametrize(("held", "wanted"), [(3, 1), (1, 3), (1, 0), (0, 1), (2, 2)])
def test_a_module_is_complete_or_absent(held: int, wanted: int) -> None:
    """Prevents a module of trained and random blocks, and the first of three blocks loaded as the complete module."""
    shapes = whole_shapes(CONFIG, RecycleConfig(layers=wanted, depth=2))
    if held and wanted and held != wanted:
        with pytest.raises(
            CheckpointError, match=r"recycle\.blocks\.\d.* recycle\.layers to the values it was saved with"
        ):
            check_tensors(source(held), shapes, ["recycle."])
        return
    absent = check_tensors(source(held), shapes, ["recycle."])
    assert absent == sorted(name for name in shapes if name.startswith("recycle.") and not held)
    if held != wanted:
        with pytest.raises(CheckpointError, match=r"recycle\."):
            check_tensors(source(held), shapes)


def test_the_backbone_is_never_optional() -> None:
    """Prevents a model with a random layer because its source had fewer layers."""
    shapes = whole_shapes(CONFIG.model_copy(update={"layers": 3}), RecycleConfig(layers=0))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.2\."):
        check_tensors(source(1), shapes, ["recycle."])


def test_a_module_without_taps_can_be_given_them() -> None:
    """Prevents a trained module from being trained from scratch because it gets taps, and taps that are silently dropped."""
    shapes = whole_shapes(CONFIG, RecycleConfig(layers=1, taps=(0, 1)))
    optional = ["recycle.", "recycle.tap_", "recycle.confidence."]
    added = [name for name in shapes if name.startswith("recycle.tap_")]
    assert check_tensors(source(1), shapes, optional) == sorted(added) and len(added) == 3
    with pytest.raises(CheckpointError, match=r"missing: recycle\.tap_norms"):
        check_tensors(source(1), shapes, ["recycle."])
    plain = whole_shapes(CONFIG, RecycleConfig(layers=1))
    module = RecycleConfig(layers=1, taps=(1,))
    tapped = ModelSource(build_model(CONFIG, module, seed=1), CONFIG, module, Path("models/one"))
    for wanted in (plain, shapes):
        with pytest.raises(CheckpointError, match=r"recycle\.tap_"):
            check_tensors(tapped, wanted, optional)
