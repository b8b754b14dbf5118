"""Parts of the recycle module that not every module has: stored in formats that have room for them, refused by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.conversion.inspection import describe
from recycle_ds.checkpoint.loading import load_model, load_weights
from recycle_ds.checkpoint.portable.manifest import DataIdentity, Manifest
from recycle_ds.checkpoint.portable.writing import write_portable
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.run.init_from import init_from_defaults
from recycle_ds.checkpoint.run.same_run import check_same_run
from recycle_ds.config import RecycleConfig
from recycle_ds.model import build_model
from recycle_ds.model.flops import parameters
from tests.runs import tiny_run
from tests.unit.checkpoint.conversion_cases import model_folder
from tests.unit.checkpoint.memory import ModelSource
from tests.unit.inference.models import spread_added

PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "taps": ({"taps": (0, 2)}, "recycle.tap_projection.weight"),
    "confidence": ({"confidence": True}, "recycle.confidence.weight"),
}
"""The settings of each part, and one of its tensors."""


def with_parts(folder: Path, **settings: Any) -> Path:
    """A folder in the portable format of a model whose module has the parts."""
    base = open_source(model_folder(folder / "base"))
    recycle = RecycleConfig(layers=1, depth=2, **settings)
    model = spread_added(build_model(base.model, recycle, seed=3))
    (folder / "portable").mkdir()
    source = ModelSource(model, base.model, recycle, folder)
    source.tokenizer = base.tokenizer
    write_portable(source, folder / "portable", None, 2**30, lambda _: None)
    return folder / "portable"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_survives_a_round_trip(tmp_path: Path, part: str) -> None:
    """Prevents a Hugging Face folder or checkpoint that loses a part, or an inspection that does not show it."""
    settings, tensor = PARTS[part]
    folder = with_parts(tmp_path, **settings)
    convert(str(folder), str(tmp_path / "hf"), Conversion("hf"))
    back = convert(str(tmp_path / "hf"), str(tmp_path / "back"), Conversion("portable"))
    before = open_source(folder)
    assert dict(back.shapes) == dict(before.shapes) and tensor in back.shapes
    assert all(torch.equal(back.read(name), before.read(name)) for name in before.shapes)
    for path in (folder, tmp_path / "hf", tmp_path / "back"):
        model = load_model(str(path)).model
        fresh = build_model(model.config, RecycleConfig(layers=1, **settings), seed=None)
        load_weights(fresh, open_source(path))
        assert model.recycle_config.model_dump(include=set(settings)) == settings
        found = describe(path)
        assert found["parameters"] == parameters(model.config, model.recycle_config)
        assert found["recycle"] is not None and all(found["recycle"][key] for key in settings)
    inherited = init_from_defaults({"init_from": str(tmp_path / "hf")})["recycle"]
    assert RecycleConfig(**inherited).model_dump(include=set(settings)) == settings


@pytest.mark.parametrize("target", ["megatron", "vllm"])
@pytest.mark.parametrize("part", PARTS)
def test_a_format_without_room_for_a_part(tmp_path: Path, part: str, target: str) -> None:
    """Prevents an export whose module drafts worse because a part was left out."""
    folder = with_parts(tmp_path, **PARTS[part][0])
    with pytest.raises(CheckpointError, match=rf"recycle\.{part}=.*(portable or hf|--to hf)"):
        convert(str(folder), str(tmp_path / "out"), Conversion(target))
    assert not (tmp_path / "out").exists()


def test_older_releases_read_a_module_without_the_parts(tmp_path: Path) -> None:
    """Prevents folders that older releases refuse because of settings that a module does not use."""
    folder = with_parts(tmp_path)
    convert(str(folder), str(tmp_path / "hf"), Conversion("hf"))
    written = json.loads((tmp_path / "hf" / "recycle.json").read_text())["recycle"]
    assert sorted(written) == [
        "depth", "depth_decay", "draft_vocabulary", "gradient", "layers", "loss_weight", "start_step", "warmup_steps",
    ]  # fmt: skip


def test_a_run_of_an_older_release_resumes(tmp_path: Path) -> None:
    """Prevents a refused resume because the checkpoint's configuration does not have the later settings."""
    config = tiny_run(tmp_path, tmp_path / "run")
    tree = config.model_dump(mode="json")
    for key in [key for key in tree["recycle"] if key not in ("layers", "depth", "loss_weight", "gradient")]:
        del tree["recycle"][key]
    for key in ("qk_norm", "qkv_bias"):
        del tree["model"][key]
    del tree["model"]["rope"]["unrotated_layers"]
    identity = DataIdentity(tokenizer="t", train=[])
    manifest = Manifest.model_construct(config=tree, data=identity)
    assert check_same_run(config, identity, manifest, tmp_path) == []
    drafts = {"recycle__draft_vocabulary": 8, "recycle__draft_vocabulary_in_training": True}
    earlier, later = (
        tiny_run(tmp_path, tmp_path / "run", **(drafts | {"recycle__draft_vocabulary": n})) for n in (8, 9)
    )
    other = Manifest.model_construct(config=earlier.model_dump(mode="json"), data=identity)
    with pytest.raises(CheckpointError, match=r"recycle\.draft_vocabulary was 8 and is 9"):
        check_same_run(later, identity, other, tmp_path)
    changed = tiny_run(tmp_path, tmp_path / "run", recycle__taps=[1])
    with pytest.raises(CheckpointError, match=r"recycle\.taps was \[\] and is \[1\]"):
        check_same_run(changed, identity, manifest, tmp_path)
