"""The settings that a run takes from its `init_from` folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.run.init_from import init_from_defaults
from recycle_ds.config import parse_config, save_config
from tests.runs import ROOT
from tests.unit.checkpoint.conversion_cases import model_folder


def tree(folder: Path, init_from: Path) -> dict[str, Any]:
    """The configuration of a retrofit without a model shape and without a tokenizer."""
    return {
        "run_dir": str(folder / "run"),
        "deepspeed": str(ROOT / "ds_configs" / "deepspeed" / "zero1.json"),
        "init_from": str(init_from),
        "data": {"train": [{"path": "train"}]},
        "recycle": {"gradient": "frozen_backbone"},
        "training": {"steps": 2, "micro_batch_size": 1, "global_batch_size": 1, "seq_length": 8, "learning_rate": 1e-3},
    }


def test_shape_and_tokenizer_come_from_the_folder(tmp_path: Path) -> None:
    """Prevents a retrofit that requires the model's shape again, and a context length that silently differs."""
    folder = model_folder(tmp_path / "model", "llama3_rope")
    config = parse_config(tree(tmp_path, folder), (), init_from_defaults)
    assert (config.model.layers, config.model.hidden, config.model.kv_heads, config.model.max_positions) == (
        3,
        48,
        2,
        128,
    )
    assert config.model.rope.scaling is not None and config.model.rope.scaling.kind == "llama3"
    assert config.data.tokenizer == str(folder / "tokenizer.json")
    assert (config.recycle.layers, config.recycle.depth, config.recycle.gradient) == (1, 1, "frozen_backbone")
    changed = parse_config(
        tree(tmp_path, folder), ["model.max_positions=64", "data.tokenizer=mine.json"], init_from_defaults
    )
    assert (changed.model.max_positions, changed.model.layers, changed.data.tokenizer) == (64, 3, "mine.json")
    assert init_from_defaults({"run_dir": "x"}) == {}


def test_the_module_of_the_folder_is_kept(tmp_path: Path) -> None:
    """Prevents a run from replacing the folder's module because its configuration does not repeat the layers."""
    folder = model_folder(tmp_path / "model")
    convert(str(folder), str(tmp_path / "with"), Conversion("hf", recycle_layers=2, recycle_depth=3))
    config = parse_config(tree(tmp_path, tmp_path / "with"), (), init_from_defaults)
    assert (config.recycle.layers, config.recycle.depth) == (2, 3)


def test_a_later_start_does_not_need_the_folder(tmp_path: Path) -> None:
    """Prevents a resume that fails because the `init_from` folder was deleted."""
    folder = model_folder(tmp_path / "model")
    first = parse_config(tree(tmp_path, folder), (), init_from_defaults)
    (tmp_path / "run").mkdir()
    save_config(first, tmp_path / "run" / "config.yaml")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    shutil.copy(folder / "tokenizer.json", checkpoint)
    shutil.rmtree(folder)
    later = parse_config(tree(tmp_path, folder), (), init_from_defaults)
    assert (later.model, later.recycle) == (first.model, first.recycle)
    assert Path(later.data.tokenizer) == checkpoint / "tokenizer.json", "the folder's own tokenizer was deleted"
    with pytest.raises(CheckpointError, match="elsewhere: no such folder"):
        parse_config(tree(tmp_path, tmp_path / "elsewhere"), (), init_from_defaults)
    (tmp_path / "run" / "config.yaml").write_text("init_from: [")
    with pytest.raises(CheckpointError, match="no such folder"):
        parse_config(tree(tmp_path, folder), (), init_from_defaults)
