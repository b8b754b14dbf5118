"""Reading and writing Hugging Face folders: equal logits, equal bits, and errors that list the mismatches."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.loading import load_weights
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config import RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.model import RecycleGPT, build_model
from tests.unit.checkpoint.families import CASES, make, save
from tests.unit.checkpoint.memory import ModelSource


def logits_of(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    """Returns logits [B, S, V] of our model with a source's weights."""
    model = build_model(source.model, source.recycle, seed=None).eval()
    load_weights(model, source)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    ahead = tokens.expand(1 + model.depth, -1, -1)
    batch = Batch(tokens, positions, torch.zeros_like(tokens), ahead, ahead)
    with torch.no_grad():
        (hidden, *_) = model.states(batch)
        return model.logits(hidden).transpose(0, 1)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(300, (2, 100), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_both_directions(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Prevents a transposed or permuted projection, a lost bias, or a wrong RoPE base: the model would output noise."""
    model = save(name, tmp_path / "original")
    with torch.no_grad():
        expected = model(tokens).logits
    source = open_source(tmp_path / "original")
    torch.testing.assert_close(logits_of(source, tokens), expected, rtol=1e-4, atol=1e-4)
    portable = convert(str(tmp_path / "original"), str(tmp_path / "portable"), Conversion("portable"))
    assert portable.kind == "portable"
    torch.testing.assert_close(logits_of(portable, tokens), expected, rtol=1e-4, atol=1e-4)
    convert(str(tmp_path / "portable"), str(tmp_path / "back"), Conversion("hf"))
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    actual, original = again.state_dict(), model.state_dict()
    assert actual.keys() == original.keys()
    for key, value in original.items():
        assert torch.equal(actual[key], value), key


def test_a_changed_weight_changes_the_logits(tmp_path: Path, tokens: torch.Tensor) -> None:
    """Prevents the comparison above from passing for any weights."""
    model = save("llama", tmp_path / "original")
    path = tmp_path / "original" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"].flip(0)
    save_file(tensors, path, metadata={"format": "pt"})
    with torch.no_grad():
        expected = model(tokens).logits
    assert (logits_of(open_source(tmp_path / "original"), tokens) - expected).abs().max() > 0.1


def test_sharded_and_bf16_keep_their_bits(tmp_path: Path) -> None:
    """Prevents a lost shard, and a dtype that changes without being requested."""
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "original", max_shard_size="60KB")
    assert len(list((tmp_path / "original").glob("model-*.safetensors"))) > 2
    result = convert(str(tmp_path / "original"), str(tmp_path / "portable"), Conversion("portable", shard_gib=5e-5))
    assert len(list((tmp_path / "portable").glob("shard-*.safetensors"))) > 2
    source = open_source(tmp_path / "original")
    for key in source.shapes:
        assert result.dtype(key) == source.dtype(key) == torch.bfloat16
        assert torch.equal(result.read(key), source.read(key)), key
    old = os.umask(0)
    os.umask(old)
    assert (tmp_path / "portable" / "shard-00000-000.safetensors").stat().st_mode & 0o777 == 0o666 & ~old
    wide = convert(str(tmp_path / "portable"), str(tmp_path / "wide"), Conversion("hf", dtype="fp32", shard_gib=5e-5))
    assert (tmp_path / "wide" / "model.safetensors.index.json").is_file()
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    for key in source.shapes:
        assert torch.equal(wide.read(key), source.read(key).float()), key


def with_module(folder: Path, name: str = "llama", layers: int = 2) -> RecycleGPT:
    """Writes a portable checkpoint of a model with a recycle module; returns the model."""
    save(name, folder / "base")
    base = open_source(folder / "base")
    config = RecycleConfig(layers=layers, depth=3)
    model = build_model(base.model, config, seed=5)
    source = ModelSource(model, base.model, config, folder)
    from recycle_ds.checkpoint.portable.writing import write_portable

    (folder / "portable").mkdir()
    write_portable(source, folder / "portable", None, 2**30, lambda _: None)
    return model


def test_the_module_is_kept_next_to_the_model(tmp_path: Path, tokens: torch.Tensor) -> None:
    """Prevents a module that is lost or changed in Hugging Face's format, or that breaks loading with transformers."""
    model = with_module(tmp_path)
    result = convert(str(tmp_path / "portable"), str(tmp_path / "hf"), Conversion("hf"))
    assert (tmp_path / "hf" / "recycle.safetensors").is_file() and (tmp_path / "hf" / "recycle.json").is_file()
    assert result.recycle == RecycleConfig(layers=2, depth=3)
    loaded = build_model(result.model, result.recycle, seed=None)
    load_weights(loaded, result)
    for (name, actual), (_, original) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(actual, original), name
    from transformers import AutoModelForCausalLM

    base, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(tokens).logits, logits_of(result, tokens), rtol=1e-4, atol=1e-4)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt2"}, ["model_type='gpt2'", "llama, mistral, qwen2"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "only 'silu'"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "default, linear and llama3"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["'linear': missing factor"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_hidden_layers": 4}, ["missing: model.layers.3.", "and 5 more"]),
        ({"num_hidden_layers": 2}, ["not supported: model.layers.2."]),
        ({"intermediate_size": 80}, ["wrong shape: model.layers.0.mlp.down_proj.weight [48, 96] instead of [48, 80]"]),
        ({"num_attention_heads": 7}, ["heads (7)"]),
        ({"hidden_size": "wide"}, ["hidden_size='wide'"]),
    ],
)
def test_mismatches_are_listed(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    """Prevents a partly loaded model, or one that computes something else than its weights were trained for."""
    save("llama", tmp_path / "original")
    edit_config(tmp_path / "original", **changes)
    with pytest.raises(CheckpointError) as caught:
        convert(str(tmp_path / "original"), str(tmp_path / "out"), Conversion("portable"))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"], "no output is left behind"


def test_missing_and_unsafe_files(tmp_path: Path) -> None:
    """Prevents an incomplete copy, a pickle that runs code, and an index that points outside the folder."""
    make("llama").save_pretrained(tmp_path / "original", max_shard_size="60KB")
    folder = tmp_path / "original"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    (folder / shard).rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"missing: {shard}"):
        open_source(folder)
    (tmp_path / "away").rename(folder / shard)
    open_source(folder)
    content = (folder / shard).read_bytes()
    (folder / shard).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{shard}: cannot be read"):
        open_source(folder)
    outside = dict.fromkeys(index["weight_map"], f"../{shard}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(CheckpointError, match="must be the name of a safetensors file in the same folder"):
        open_source(folder)
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="a pickle, which is never loaded"):
        open_source(folder)


def test_a_damaged_module_is_found(tmp_path: Path) -> None:
    """Prevents a module of another model, or a partly copied one, from being loaded with the base model."""
    with_module(tmp_path)
    convert(str(tmp_path / "portable"), str(tmp_path / "hf"), Conversion("hf"))
    path = tmp_path / "hf" / "recycle.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"recycle\.safetensors does not match its checksum"):
        open_source(tmp_path / "hf")
    (tmp_path / "hf" / "recycle.json").unlink()
    with pytest.raises(CheckpointError, match=r"without recycle\.json"):
        open_source(tmp_path / "hf")


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    """Prevents attention to positions beyond the sliding window, which the original model does not attend to."""
    save("mistral", tmp_path / "original")
    edit_config(tmp_path / "original", sliding_window=64)
    source = open_source(tmp_path / "original")
    assert source.model.max_positions == 64 and "sliding_window=64" in source.notes[0]


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        (Conversion("gguf"), "--to gguf: must be one of hf, portable, megatron, vllm"),
        (Conversion("hf", dtype="int8"), "--dtype int8: must be one of fp32, bf16, fp16"),
        (Conversion("hf", shard_gib=0), "--shard-gib 0: must be above 0"),
        (Conversion("hf", tensor=2), "--tp 2 --pp 1: only --to megatron has a layout"),
    ],
)
def test_wrong_requests(tmp_path: Path, conversion: Conversion, message: str) -> None:
    """Prevents an invalid option from being ignored silently, and an existing folder from being overwritten."""
    save("llama", tmp_path / "original")
    with pytest.raises(CheckpointError, match=message):
        convert(str(tmp_path / "original"), str(tmp_path / "out"), conversion)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "existing.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="already exists"):
        convert(str(tmp_path / "original"), str(tmp_path / "out"), Conversion("portable"))
    assert (tmp_path / "out" / "existing.txt").read_text() == "precious"


def test_formats_are_recognised_by_content(tmp_path: Path) -> None:
    """Prevents a format from being recognised by the folder's name."""
    save("llama", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "step-00000001")
    assert open_source(tmp_path / "step-00000001").kind == "huggingface"
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        open_source(tmp_path)
