"""Invalid Megatron checkpoints: an error that lists the mismatches, and no code from a file is run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.recognition import open_source
from tests.unit.checkpoint.megatron_cases import (
    CHECKPOINT,
    edit,
    first_info,
    refusal,
    rename,
    use_arguments,
    write,
)


class Foreign:
    """Creates a folder when it is unpickled, like the code in a malicious pickle."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.target,)


def test_no_foreign_class_is_called(tmp_path: Path) -> None:
    """Prevents a checkpoint from running code through `.metadata`, common.pt or the bytes of a tensor."""
    write(tmp_path / "run")
    folder, trap = tmp_path / "run" / CHECKPOINT, tmp_path / "trap"
    original = (folder / ".metadata").read_bytes()
    edit(folder, lambda listing: setattr(listing, "planner_data", Foreign(str(trap))))
    assert "posix.mkdir, which is not a class of this format" in refusal(folder)
    (folder / ".metadata").write_bytes(original)
    use_arguments(folder, trap=Foreign(str(trap)))
    assert "posix.mkdir, which is not a class of this format" in refusal(folder)
    use_arguments(folder)
    source = open_source(folder)
    for path in folder.glob("*.distcp"):
        path.write_bytes(pickle.dumps(Foreign(str(trap))) + bytes(path.stat().st_size))
    with pytest.raises(CheckpointError, match="cannot be read"):
        source.read("final_norm.weight")
    assert not trap.exists()
    # allowed classes are replaced by placeholders, so a file cannot modify the real ones
    hostile = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x08__init__Ns\x86b."
    (folder / ".metadata").write_bytes(hostile)
    refusal(folder)
    from torch.distributed.checkpoint.metadata import Metadata

    assert Metadata({}).state_dict_metadata == {}


def drop(name: str) -> Callable[[Any], None]:
    return lambda listing: listing.state_dict_metadata.pop(name)


def cut(listing: Any) -> None:
    listing.state_dict_metadata["embedding.word_embeddings.weight"].chunks.pop()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (drop("decoder.final_layernorm.weight"), ["missing: decoder.final_layernorm.weight"]),
        (
            drop("decoder.layers.mlp.linear_fc2.weight"),
            ["missing: decoder.layers.0.mlp.linear_fc2.weight, decoder.layers.1.mlp"],
        ),
        (
            rename("decoder.final_layernorm.weight", "decoder.layers.mlp.router.weight"),
            ["missing: decoder.final_layernorm.weight", "not supported: decoder.layers.mlp.router.weight"],
        ),
        (
            rename("mtp.layers.0.enorm.weight", "mtp.layers.1.enorm.weight"),
            ["MTP layers 0 to 1", "separate weights for every depth"],
        ),
        (cut, ["embedding.word_embeddings.weight: its chunks do not tile [128, 32]"]),
        (
            lambda listing: setattr(first_info(listing), "relative_path", "../secret.distcp"),
            ["'../secret.distcp': must be the name of a .distcp file in the same folder"],
        ),
        (lambda listing: setattr(first_info(listing), "relative_path", "__9_0.distcp"), ["__9_0.distcp is missing"]),
        (lambda listing: setattr(first_info(listing), "length", 10**12), ["ends beyond"]),
        (lambda listing: setattr(first_info(listing), "transform_descriptors", ["zstd"]), ["is compressed"]),
        (
            lambda listing: setattr(
                listing.state_dict_metadata["decoder.final_layernorm.weight"].properties, "dtype", torch.int8
            ),
            ["unsupported dtype: decoder.final_layernorm.weight torch.int8"],
        ),
        (lambda listing: setattr(listing, "storage_data", 7), ["invalid metadata"]),
    ],
)
def test_an_invalid_tensor_list(change: Callable[[Any], None], parts: list[str], tmp_path: Path) -> None:
    """Prevents a partly loaded model, and reads outside the folder."""
    write(tmp_path / "run")
    edit(tmp_path / "run" / CHECKPOINT, change)
    message = refusal(tmp_path / "run")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_experts": 8}, ["num_experts=8 is not supported, only None"]),
        ({"swiglu": False}, ["swiglu=False is not supported, only True"]),
        ({"normalization": "LayerNorm"}, ["normalization='LayerNorm'", "only 'RMSNorm'"]),
        ({"position_embedding_type": "learned_absolute"}, ["position_embedding_type='learned_absolute'"]),
        ({"add_bias_linear": True}, ["add_bias_linear=True"]),
        ({"multi_latent_attention": True}, ["multi_latent_attention=True"]),
        ({"qk_layernorm": True}, ["missing: ", "self_attention.q_layernorm.weight"]),
        ({"rotary_percent": 0.5}, ["rotary_percent=0.5 is not supported, only 1.0"]),
        ({"rotary_interleaved": True}, ["rotary_interleaved=True"]),
        ({"window_size": (128, 0)}, ["window_size=(128, 0)"]),
        ({"spec": torch.ones(3)}, ["spec='<Tensor>' is not supported"]),
        ({"mtp_num_layers": 2}, ["mtp_num_layers=2", "separate weights for every depth"]),
        ({"mtp_num_layers": None}, ["not supported: mtp.layers.0."]),
        ({"num_layers": ..., "swiglu": ...}, ["missing in args: num_layers, swiglu"]),
        ({"num_layers": 5}, ["wrong shape: ", "linear_fc1.layer_norm_weight [4, 32] instead of [5, 32]"]),
        ({"ffn_hidden_size": 40}, ["wrong shape: ", "linear_fc1.weight [4, 96, 32] instead of [4, 80, 32]"]),
        ({"untie_embeddings_and_output_weights": True}, ["missing: output_layer.weight"]),
        ({"num_attention_heads": 7}, ["heads (7)"]),
        ({"hidden_size": "wide"}, ["hidden='wide'"]),
        ({"vocab_size": 129}, ["wrong shape: embedding.word_embeddings.weight [128, 32] instead of [129, 32]"]),
    ],
)
def test_arguments_that_do_not_match(changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    """Prevents settings in the arguments from being ignored: the model would run and compute wrong results."""
    write(tmp_path / "run")
    message = refusal(use_arguments(tmp_path / "run" / CHECKPOINT, **changes))
    for part in parts:
        assert part in message


def test_other_formats_are_named(tmp_path: Path) -> None:
    """Prevents a folder in an older format from being reported as damaged."""
    write(tmp_path / "run")
    folder = tmp_path / "run" / CHECKPOINT
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    assert "format 'zarr' is not supported, only 'torch_dist'" in refusal(folder)
    (folder / "metadata.json").unlink()
    assert "not saved by megatron.core.dist_checkpointing" in refusal(folder)


def test_broken_checkpoints(tmp_path: Path) -> None:
    """Prevents a damaged file from causing a crash, a stack trace or wrong weights."""
    source = write(tmp_path / "intact", tensor=1, pipeline=1)
    shutil.copytree(tmp_path / "intact" / CHECKPOINT, tmp_path / "arguments")
    models = [source.model, open_source(use_arguments(tmp_path / "arguments")).model]
    draw = random.Random(5)
    outcomes: Counter[str] = Counter()
    for number in range(120):
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "intact" / CHECKPOINT, folder)
        if number % 2:
            use_arguments(folder)
        path = folder / draw.choice([".metadata", ".metadata", "common.pt", "recycle_ds.json", "__0_0.distcp"])
        content = bytearray(path.read_bytes() if path.exists() else b"")
        for _ in range(draw.choice([1, 1, 30])):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.choice([len(content), len(content), draw.randrange(len(content) + 1)])])
        try:
            opened = open_source(folder)
            values = {name: opened.read(name) for name in opened.shapes}
        except CheckpointError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and str(folder) in str(error), str(error)
        else:
            outcomes["loaded"] += 1
            # a digit of recycle_ds.json may give another model with the same shapes: this cannot be detected
            assert path.name == "recycle_ds.json" or opened.model == models[number % 2], (number, path.name)
            for name, value in values.items() if opened.model == models[number % 2] else ():
                assert torch.equal(value, source.read(name)), f"mutation {number} of {path.name}: {name}"
        shutil.rmtree(folder)
    assert outcomes["refused"] > 60 and outcomes["loaded"] > 10, outcomes
    assert open_source(tmp_path / "intact").shapes == source.shapes
