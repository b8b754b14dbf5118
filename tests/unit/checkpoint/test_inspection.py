"""Descriptions of checkpoint folders, and comparisons of two folders."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.comparison import compare, print_comparison
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.conversion.inspection import describe, print_description
from recycle_ds.checkpoint.portable.manifest import read_manifest, write_manifest
from recycle_ds.checkpoint.recognition import open_source
from tests.unit.checkpoint.conversion_cases import model_folder, one_line_error, run_tool
from tests.unit.checkpoint.families import SHAPE, make, save
from tests.unit.checkpoint.native_folder import write_folder


@pytest.fixture
def portable(tmp_path: Path) -> Path:
    save("llama_mha_wide_heads", tmp_path / "original")
    convert(str(tmp_path / "original"), str(tmp_path / "portable"), Conversion("portable"))
    return tmp_path / "portable"


def changed(portable: Path, section: str, **changes: Any) -> Path:
    """A copy of a portable folder with other settings and the same tensors."""
    copy = portable.with_name("copy")
    shutil.copytree(portable, copy)
    manifest = read_manifest(copy)
    config = {**manifest.config, section: {**manifest.config[section], **changes}}
    write_manifest(copy, manifest.model_copy(update={"config": config}).model_dump(mode="json"))
    return copy


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": {"theta": 5e5}},
        {"rope": {"theta": 1e4, "scaling": {"kind": "linear", "factor": 2.0}}},
        {"norm_epsilon": 1e-6},
        {"heads": 5, "kv_heads": 5, "head_dim": 16},
        {"max_positions": 64},
    ],
)
def test_the_same_weights_under_other_settings_are_another_model(
    portable: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents exit code 0 for two folders whose models compute different results."""
    found = compare(portable, changed(portable, "model", **changes))
    assert not found["equal"] and found["settings"] and not found["other_values"]
    print_comparison(found, as_json=False)
    printed = capsys.readouterr().out
    assert "the folders differ" in printed and f"model.{next(iter(changes))}" in printed


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("model", {"vocab_multiple": 8, "init_std": 0.5}),
        ("recycle", {"loss_weight": 0.9, "gradient": "detached", "warmup_steps": 3, "depth": 2}),
    ],
)
def test_training_settings_are_no_difference(
    portable: Path, section: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a script from rejecting a conversion for a setting that no forward pass uses."""
    found = compare(portable, changed(portable, section, **changes))
    assert found["equal"] and not found["settings"] and len(found["training_settings"]) == len(changes)
    print_comparison(found, as_json=False)
    assert "the folders differ" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "linear_rope", "llama3_rope", "llama_tied"])
def test_a_round_trip_gives_the_same_model(tmp_path: Path, name: str) -> None:
    """Prevents two spellings of one model (head width given or implied) from counting as a difference."""
    save(name, tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    tree = json.loads(path.read_text())
    del tree["head_dim"]
    path.write_text(json.dumps(tree))
    previous = tmp_path / "original"
    for target in ("portable", "hf") if name == "llama3_rope" else ("portable", "megatron", "hf"):
        convert(str(previous), str(tmp_path / target), Conversion(target))
        previous = tmp_path / target
        found = compare(tmp_path / "original", previous)
        assert found["equal"], found


def edit(folder: Path, row: int, values: list[float]) -> None:
    """Sets the first values of a row of one tensor of a Hugging Face folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][row, : len(values)] = torch.tensor(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_nan_and_infinity_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents two copies of a diverged model that differ "by at most nan", and a difference hidden by NaN."""
    left, right = tmp_path / "left", tmp_path / "right"
    save("llama", left)
    edit(left, 0, [math.nan, math.inf, 1.0])
    shutil.copytree(left, right)
    assert compare(left, right)["equal"]
    edit(right, 0, [math.nan, math.inf, 1.5])
    found = compare(left, right)
    assert found["other_values"] == {"blocks.1.mlp.up.weight": {"gap": 0.5, "not_finite": 0}} and not found["equal"]
    edit(right, 0, [2.0, -math.inf, 1.0])
    found = compare(left, right)
    assert found["other_values"] == {"blocks.1.mlp.up.weight": {"gap": 0.0, "not_finite": 2}} and not found["equal"]
    json.loads(json.dumps(found, allow_nan=False))
    print_comparison(found, as_json=False)
    assert "blocks.1.mlp.up.weight: 2 values are NaN or infinite on one side only" in capsys.readouterr().out


def deepspeed_folder(folder: Path) -> Path:
    """A Hugging Face model as a DeepSpeed checkpoint of three data ranks, without other files."""
    write_folder(folder, {name: value.detach() for name, value in make("llama").named_parameters()})
    return folder


def test_deepspeed_with_its_configuration(tmp_path: Path) -> None:
    """Prevents an error that suggests --config FILE for a command without this option, and a missing layout."""
    original = model_folder(tmp_path / "original")
    folder = deepspeed_folder(tmp_path / "deepspeed")
    with pytest.raises(CheckpointError, match="with --config FILE"):
        describe(folder)
    found = describe(folder, config=original / "config.json")
    assert found["kind"] == "deepspeed" and found["layout"] == {"world_size": 3, "tensor": 1, "pipeline": 1, "data": 3}
    for left, right in ((folder, original), (original, folder), (folder, folder)):
        assert compare(left, right, config=original / "config.json")["equal"], (left, right)
    with pytest.raises(CheckpointError, match="only for DeepSpeed folders"):
        compare(original, original, config=original / "config.json")


def test_the_command(tmp_path: Path) -> None:
    """Prevents a script from accepting a damaged or different folder, or reading a traceback as JSON."""
    original = model_folder(tmp_path / "original")
    convert(str(original), str(tmp_path / "portable"), Conversion("portable"))
    shown = run_tool("inspect_checkpoint", tmp_path / "portable", "--json")
    assert shown.returncode == 0 and not shown.stderr
    found = json.loads(shown.stdout)
    assert found["kind"] == "portable" and found["checksums"] == "hold" and found["tokenizer"] is True
    assert found["model"]["hidden"] == SHAPE["hidden_size"] and found["dtypes"] == {
        "float32": len(open_source(original).shapes)
    }
    table = run_tool("inspect_checkpoint", tmp_path / "portable")
    assert table.returncode == 0 and f"{found['parameters']:,}" in table.stdout
    same = run_tool("inspect_checkpoint", original, "--diff", tmp_path / "portable")
    assert same.returncode == 0 and same.stdout.endswith(f"{found['tensors']} tensors are equal\n")
    edit(original, 2, [7.0])
    other = run_tool("inspect_checkpoint", original, "--diff", tmp_path / "portable", "--json")
    assert other.returncode == 1 and not json.loads(other.stdout)["equal"] and not other.stderr
    shard = tmp_path / "portable" / "shard-00000-000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for arguments in ((tmp_path / "portable",), (original, "--diff", tmp_path / "portable")):
        assert "does not match its checksum" in one_line_error(run_tool("inspect_checkpoint", *arguments))
    folder = deepspeed_folder(tmp_path / "deepspeed")
    assert "--config FILE" in one_line_error(run_tool("inspect_checkpoint", folder))
    configured = run_tool("inspect_checkpoint", folder, "--config", original / "config.json", "--json")
    assert json.loads(configured.stdout)["layout"]["data"] == 3


def test_a_description_is_readable_in_a_pipe(portable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents lines of hundreds of characters, and values in Python's notation."""
    found = describe(portable) | {
        "folder": "short",
        "provenance": {"command": ["recycle-ds", "pretrain"], "git": "0" * 40},
    }
    print_description(found, as_json=False)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert not any(text in printed for text in ("{", "[", "'", "True", "None"))
    assert "command=recycle-ds pretrain" in printed and "tied_embeddings=" in printed and "rope.theta=" in printed
