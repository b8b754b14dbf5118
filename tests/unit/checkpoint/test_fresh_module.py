"""A recycle module added by a conversion: initialised as in a run, next to an unchanged backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.conversion.options import TARGETS
from recycle_ds.checkpoint.loading import load_weights
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config import RecycleConfig
from recycle_ds.model import build_model
from recycle_ds.model.sharding import canonical_shapes, pieces
from recycle_ds.parallel.mesh import Mesh
from tests.unit.checkpoint.families import make, save
from tests.unit.checkpoint.memory import ModelSource

DEFAULT_SEED = 1234


def initial_weights(source: Source, seed: int) -> ModelSource:
    """The initial weights of a run with the shape of a source."""
    model = build_model(source.model, source.recycle, seed=seed)
    assert canonical_shapes(pieces(model, Mesh())).keys() == source.shapes.keys()
    return ModelSource(model, source.model, source.recycle, source.folder)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])
def test_it_equals_the_initial_module_of_a_run(tmp_path: Path, target: str, name: str) -> None:
    """Prevents a module that no run can reproduce or that misses a part, and a backbone changed by adding it."""
    save(name, tmp_path / "original")
    original = open_source(tmp_path / "original")
    conversion = Conversion(target, recycle_layers=1, recycle_depth=3, seed=9)
    result = convert(str(tmp_path / "original"), str(tmp_path / "out"), conversion)
    assert (result.recycle.layers, result.recycle.depth) == (1, 3)
    initial = initial_weights(result, 9)
    for key in result.shapes:
        expected = initial.read(key) if key.startswith("recycle.") else original.read(key)
        assert torch.equal(result.read(key), expected), key
    load_weights(build_model(result.model, result.recycle, seed=None), result)


def test_other_seeds_and_dtypes(tmp_path: Path) -> None:
    """Prevents ignoring the seed, and a module of another dtype than its backbone, which Megatron and ZeRO-3 refuse."""
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "original")

    def with_seed(number: int | None) -> Source:
        conversion = Conversion("portable", recycle_layers=2, seed=number)
        return convert(str(tmp_path / "original"), str(tmp_path / f"seed-{number}"), conversion)

    default, same, other = with_seed(None), with_seed(DEFAULT_SEED), with_seed(0)
    name = "recycle.blocks.1.mlp.down.weight"
    assert default.recycle == RecycleConfig(layers=2)
    assert default.dtype(name) == torch.bfloat16
    assert torch.equal(default.read(name), initial_weights(default, DEFAULT_SEED).read(name).bfloat16())
    assert torch.equal(default.read(name), same.read(name)) and not torch.equal(default.read(name), other.read(name))


def test_a_module_is_not_replaced(tmp_path: Path) -> None:
    """Prevents overwriting a trained module with random weights."""
    save("llama", tmp_path / "original")
    conversion = Conversion("portable", recycle_layers=1)
    convert(str(tmp_path / "original"), str(tmp_path / "one"), conversion)
    with pytest.raises(CheckpointError, match=r"one: already has a recycle module of 1 layer\(s\)") as caught:
        convert(str(tmp_path / "one"), str(tmp_path / "two"), conversion)
    assert "\n" not in str(caught.value) and not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        (Conversion("hf", recycle_layers=-1), "--recycle-layers -1: must be from 0 to 10,000"),
        (Conversion("hf", recycle_layers=99_999_999), "--recycle-layers 99999999: must be from 0 to 10,000"),
        (
            Conversion("hf", recycle_layers=1, recycle_depth=10**9),
            "--recycle-depth 1000000000: must be from 1 to 1,024",
        ),
        (Conversion("hf", recycle_layers=1, recycle_depth=0), "--recycle-depth 0: must be from 1 to 1,024"),
        (Conversion("hf", recycle_layers=1, seed=-1), "--seed -1: must be from 0 to 9,223,372,036,854,775,807"),
        (Conversion("hf", recycle_depth=2), "--recycle-depth 2: only with --recycle-layers"),
        (Conversion("hf", seed=0), "--seed 0: only with --recycle-layers"),
        (Conversion("megatron", recycle_layers=2), "recycle.layers=2: an MTP layer of Megatron has one block"),
    ],
)
def test_invalid_options(tmp_path: Path, conversion: Conversion, message: str) -> None:
    """Prevents an option that is accepted and has no effect."""
    save("llama", tmp_path / "original")
    with pytest.raises(CheckpointError, match=message):
        convert(str(tmp_path / "original"), str(tmp_path / "out"), conversion)


def test_a_module_in_several_files(tmp_path: Path) -> None:
    """Prevents --shard-gib from limiting only the backbone's files, and undetected faults of the module's files."""
    save("llama", tmp_path / "original")
    unsplit = convert(str(tmp_path / "original"), str(tmp_path / "unsplit"), Conversion("hf", recycle_layers=2))
    result = convert(str(tmp_path / "unsplit"), str(tmp_path / "out"), Conversion("hf", shard_gib=4e-5))
    files = sorted((tmp_path / "out").glob("recycle-*-of-*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 50_000
    assert not (tmp_path / "out" / "recycle.safetensors").exists()
    tree = json.loads((tmp_path / "out" / "recycle.json").read_text())
    assert sorted(tree["files"]) == [file.name for file in files]
    for key in unsplit.shapes:
        assert torch.equal(result.read(key), unsplit.read(key)), key
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    damage(tmp_path / "out", files)


def damage(folder: Path, files: list[Path]) -> None:
    """Checks that every error in the list of files is reported."""
    path, tree = folder / "recycle.json", json.loads((folder / "recycle.json").read_text())
    for change, message in (
        ({"files": {}}, "must give bytes and sha256"),
        ({"files": [files[0].name]}, "must give bytes and sha256"),
        (
            {"files": {"../recycle.safetensors": tree["files"][files[0].name]}},
            "must be recycle.safetensors or recycle-",
        ),
        ({"files": {files[0].name: {"bytes": 1}}}, "must give bytes and sha256"),
        ({"files": {files[0].name: tree["files"][files[0].name]}}, "missing: recycle."),
        ({"version": 3}, "must be 'recycle_ds module' and 1 or 2"),
        ({"version": 1}, "recycle.safetensors: None"),
    ):
        path.write_text(json.dumps(tree | change))
        with pytest.raises(CheckpointError, match=message) as caught:
            open_source(folder)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(tree))
    open_source(folder)
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{files[1].name} does not match its checksum"):
        open_source(folder)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"{files[1].name} is missing"):
        open_source(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{files[0].name} without recycle.json"):
        open_source(folder)
