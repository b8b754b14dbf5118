"""Folders that hold more, or other, files than transformers writes today: buffers, wrapped names, pickles, old tokenizers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.loading import load_model
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer
from tests.in_the_wild.folders import CLOSE, byte_tokenizer, edit_json, edit_tensors, gap, ours, rename_tensors, theirs
from tests.unit.checkpoint.families import make, save


def run_advice(message: str, new_folder: Path | None = None) -> None:
    """Runs the python command in an error message."""
    found = re.search(r"python (-c \".*\")", message)
    assert found is not None, message
    arguments = shlex.split(found.group(1).replace("NEW_FOLDER", str(new_folder)))
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=120)


def test_buffers_are_no_weights(tmp_path: Path) -> None:
    """Prevents a refusal of files from releases that saved the rotary frequencies, of the model or of every layer."""
    save("llama", tmp_path)
    expected = theirs(tmp_path)
    inverse = torch.ones(6)
    names = ["model.rotary_emb.inv_freq", *(f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(3))]
    edit_tensors(tmp_path, {name: inverse.clone() for name in (*names, "model.rotary_emb.original_inv_freq")})
    source = open_source(tmp_path)
    assert source.notes == (
        "buffers that are no weights are ignored and recomputed: model.layers.0.self_attn.rotary_emb.inv_freq, "
        "model.layers.1.self_attn.rotary_emb.inv_freq, model.layers.2.self_attn.rotary_emb.inv_freq, "
        "model.rotary_emb.inv_freq and 1 more",
    )
    assert gap(ours(source), expected) < CLOSE
    edit_tensors(tmp_path, {"model.layers.0.self_attn.gate.weight": inverse})
    with pytest.raises(CheckpointError, match=r"not supported: model\.layers\.0\.self_attn\.gate\.weight"):
        open_source(tmp_path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_names(tmp_path: Path, prefix: str) -> None:
    """Prevents a refusal of models saved from torch.compile or a data-parallel wrapper."""
    save("llama", tmp_path / "original")
    expected = theirs(tmp_path / "original")
    rename_tensors(tmp_path / "original", prefix)
    source = open_source(tmp_path / "original")
    assert source.notes == (f"all tensor names begin with {prefix!r}, which is removed",)
    assert gap(ours(source), expected) < CLOSE
    result = convert(str(tmp_path / "original"), str(tmp_path / "out"), Conversion("hf"))
    assert not result.notes and gap(theirs(tmp_path / "out"), expected) < 1e-6


def test_a_prefix_of_some_names(tmp_path: Path) -> None:
    """Prevents two models in one file from being merged into one."""
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit_tensors(tmp_path, {f"module.{name}": value + 1 for name, value in tensors.items()})
    with pytest.raises(CheckpointError, match=r"not supported: module\.lm_head\.weight"):
        open_source(tmp_path)


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    """Prevents the weights of an earlier save, whose shards were left in the folder, from being read."""
    make("llama", seed=1).save_pretrained(tmp_path, max_shard_size="60KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    index = (tmp_path / "model.safetensors.index.json").read_bytes()
    kept = {path: path.read_bytes() for path in shards}
    save("llama", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    for path, content in kept.items():
        path.write_bytes(content)
    source = open_source(tmp_path)
    assert source.notes == (
        "model.safetensors is read, and model.safetensors.index.json ignored, as transformers does",
    )
    assert gap(ours(source), theirs(tmp_path)) < CLOSE


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    """Prevents a fine-tuned model from being read without what it was tuned to."""
    save("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: the folder has an adapter \(LoRA\)"):
        open_source(tmp_path)


def test_only_a_pickle(tmp_path: Path) -> None:
    """Prevents advice that does not work: the command in the message makes a folder that loads with equal logits."""
    save("llama", tmp_path / "old")
    expected = theirs(tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which is never loaded here") as caught:
        open_source(tmp_path / "old")
    assert "\n" not in str(caught.value) and "safe_serialization" not in str(caught.value)
    run_advice(str(caught.value), tmp_path / "new")
    assert gap(ours(tmp_path / "new"), expected) < CLOSE


def test_a_tokenizer_of_vocabulary_and_merges(tmp_path: Path) -> None:
    """Prevents advice to train another tokenizer than the model's: the command in the message makes its tokenizer.json."""
    save("qwen2", tmp_path)
    model = json.loads(byte_tokenizer(tmp_path).to_json())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(CheckpointError, match=r"has a BPE tokenizer.* and no tokenizer\.json") as caught:
        load_model(str(tmp_path))
    with pytest.raises(DataError) as same:
        Tokenizer.load(tmp_path)
    assert str(same.value) == str(caught.value) and "\n" not in str(caught.value)
    run_advice(str(caught.value))
    assert Tokenizer.load(tmp_path).encode("ab") == [model["vocab"]["a"], model["vocab"]["b"]]
    assert load_model(str(tmp_path)).tokenizer.eos_id == 256


@pytest.mark.parametrize(("name", "kind"), [("tokenizer.model", "SentencePiece"), ("tekken.json", "Tekken")])
def test_other_tokenizers_are_named(tmp_path: Path, name: str, kind: str) -> None:
    """Prevents advice to train a tokenizer where the model's own is there in another format, and its loss in conversions."""
    save("llama", tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(b"content")
    with pytest.raises(CheckpointError, match=rf"has a {kind} tokenizer \({name}\) and no tokenizer.json: make one"):
        load_model(str(tmp_path / "model"))
    convert(str(tmp_path / "model"), str(tmp_path / "portable"), Conversion("portable"))
    convert(str(tmp_path / "portable"), str(tmp_path / "back"), Conversion("hf"))
    assert (tmp_path / "back" / name).read_bytes() == b"content"
