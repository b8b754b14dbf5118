"""Tiny models that cover the tensors and settings that a conversion to Megatron can confuse."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.megatron.arguments import write_arguments
from recycle_ds.checkpoint.megatron.writing import write_megatron
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import ModelConfig, RecycleConfig, RopeConfig, RopeScaling
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.layers import padded_vocabulary
from tests.unit.checkpoint.memory import ModelSource

MODEL = ModelConfig(
    layers=4, hidden=32, heads=4, kv_heads=2, ffn=48, vocab_size=107, vocab_multiple=16, max_positions=64, init_std=0.2
)
MODULE, NONE = RecycleConfig(layers=1), RecycleConfig(layers=0)
LLAMA3 = RopeConfig(theta=5e5, scaling=RopeScaling(kind="llama3", factor=8.0))
# name: model and module
CASES: dict[str, tuple[ModelConfig, RecycleConfig]] = {
    "grouped_tied": (MODEL, MODULE),
    "untied_bias": (MODEL.model_copy(update={"tied_embeddings": False, "qkv_bias": True}), MODULE),
    "multi_head_wide": (MODEL.model_copy(update={"kv_heads": 4, "head_dim": 12, "norm_epsilon": 1e-6}), NONE),
    "deep_linear_rope": (
        MODEL.model_copy(update={"rope": RopeConfig(scaling=RopeScaling(kind="linear", factor=4.0))}),
        RecycleConfig(layers=1, depth=3),
    ),
    "head_norms_wide": (MODEL.model_copy(update={"qk_norm": True, "head_dim": 16, "tied_embeddings": False}), MODULE),
    "some_layers_unrotated": (MODEL.model_copy(update={"rope": RopeConfig(unrotated_layers=(1, 3))}), NONE),
    "bias_llama3_rope": (MODEL.model_copy(update={"qkv_bias": True, "rope": LLAMA3, "tied_embeddings": False}), NONE),
}
TOKENS = torch.randint(107, (2, 24), generator=torch.Generator().manual_seed(4))


def build(model: ModelConfig, recycle: RecycleConfig, seed: int = 5) -> RecycleGPT:
    """Builds a model whose norms and biases are random too: ones and zeros would hide swapped tensors."""
    built = build_model(model, recycle, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return built


def source_of(name: str, folder: Path) -> ModelSource:
    """Returns a case as a source."""
    model, recycle = CASES[name]
    return ModelSource(build(model, recycle), model, recycle, folder)


def arguments_of(model: ModelConfig, recycle: RecycleConfig, tensor: int = 1) -> Namespace:
    """Returns the `args` that Megatron-LM would save for a model."""
    assert model.vocab_size is not None
    padded = padded_vocabulary(model.vocab_size, model.vocab_multiple, tensor)
    return Namespace(**write_arguments(model, recycle, padded, 32, torch.float32, (tensor, 1)))


CHECKPOINT = "release"


def write(folder: Path, name: str = "grouped_tied", tensor: int = 2, pipeline: int = 2) -> ModelSource:
    """Writes a case as a Megatron checkpoint to folder/release; returns its source."""
    source = source_of(name, folder)
    folder.mkdir(exist_ok=True)
    write_megatron(source, folder, None, tensor, pipeline, lambda _: None)
    return source


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    """Changes the tensor list (`.metadata`) of a checkpoint."""
    path = folder / ".metadata"
    listing = pickle.loads(path.read_bytes())  # of a checkpoint that the test has written itself
    change(listing)
    path.write_bytes(pickle.dumps(listing))


def use_arguments(folder: Path, model: ModelConfig = MODEL, recycle: RecycleConfig = MODULE, **changes: Any) -> Path:
    """Makes a checkpoint readable only through Megatron-LM's arguments; arguments with the value ... are omitted."""
    (folder / "recycle_ds.json").unlink(missing_ok=True)
    args = vars(arguments_of(model, recycle, 2)) | changes
    kept = {key: value for key, value in args.items() if value is not ...}
    torch.save({"args": Namespace(**kept), "iteration": 3}, folder / "common.pt")
    return folder


def refusal(path: Path) -> str:
    """Returns the one-line error of opening a folder."""
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def rename(name: str, other: str) -> Callable[[Any], None]:
    def change(listing: Any) -> None:
        listing.state_dict_metadata[other] = listing.state_dict_metadata.pop(name)
        for index in [index for index in listing.storage_data if index.fqn == name]:
            listing.storage_data[type(index)(other, index.offset)] = listing.storage_data.pop(index)

    return change


def first_info(listing: Any) -> Any:
    return next(info for index, info in listing.storage_data.items() if index.fqn == "decoder.final_layernorm.weight")
