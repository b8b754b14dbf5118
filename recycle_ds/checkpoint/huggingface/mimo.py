"""The MiMo layout: one folder that vLLM and SGLang serve with the recycle module as the model's MTP head.

Both choose the model by `architectures` (MiMoForCausalLM); `model_type` is qwen2, so that transformers loads the plain
base model without remote code. The backbone and the head's block are Qwen2's, whose query, key and value projections
have a bias. The head, at position t, with the token after it:

    r_t = final_layernorm(Block(input_proj [hidden_layernorm(h_t); token_layernorm(E x_{t+1})]))
    p(x_{t+2}) = softmax Head(r_t)

This is step 1 of the recycle module; later drafts feed r_t back in place of h_t, as the module's later steps do. Both
set E x_1 to zero at position 0. SGLang's h_t is the state after the final norm, as ours; vLLM's is the state before it.
Names and equations: `mimo.py` and `mimo_mtp.py` of vLLM and SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import read_json
from recycle_ds.checkpoint.huggingface.families import write_model
from recycle_ds.checkpoint.huggingface.module import MODULE_CONFIG, recycle_settings
from recycle_ds.checkpoint.huggingface.names import BLOCK, hugging_face_name
from recycle_ds.checkpoint.provenance import provenance
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config import ConfigError, ModelConfig, RecycleConfig, build_section
from recycle_ds.model.build import whole_shapes

ARCHITECTURE = "MiMoForCausalLM"
HIDDEN_NORM = "recycle.hidden_norm.weight"
_PREFIX = "model.mtp_layers.0."
_BLOCK_PREFIX = "recycle.blocks.0."
_PARTS = {
    HIDDEN_NORM: "hidden_layernorm.weight",
    "recycle.embedding_norm.weight": "token_layernorm.weight",
    "recycle.projection.weight": "input_proj.weight",
    "recycle.final_norm.weight": "final_layernorm.weight",
}
_FORMAT, _VERSION = "recycle_ds module in the MiMo layout", 1


@dataclass(frozen=True)
class Head:
    """What recycle.json adds to a folder in the MiMo layout."""

    recycle: RecycleConfig
    qkv_bias: bool
    """Whether the model has biases; if not, the folder's are zero."""
    before_norm: bool
    """Whether the head takes the states before the backbone's final norm, see `conversion.before_norm`."""


def mimo_name(canonical: str) -> str:
    """Returns a tensor's name in the MiMo layout. Raises KeyError for a tensor that the layout does not have."""
    if canonical in _PARTS:
        return _PREFIX + _PARTS[canonical]
    if canonical.startswith(_BLOCK_PREFIX):
        part, _, suffix = canonical.removeprefix(_BLOCK_PREFIX).rpartition(".")
        return f"{_PREFIX}{BLOCK[part]}.{suffix}"
    if canonical.startswith("recycle."):
        raise KeyError(canonical)
    return hugging_face_name(canonical)


def check_fits(source: Source) -> None:
    """Raises CheckpointError for a model or a module that the MiMo layout cannot express, with an alternative."""
    where, model, recycle = source.folder, source.model, source.recycle
    other = "use --to hf for the base model, and serve the module with this package"
    if not recycle.layers:
        raise CheckpointError(f"{where}: no recycle module, which --to vllm writes as the MTP head: use --to hf")
    if recycle.layers > 1:
        raise CheckpointError(f"{where}: recycle.layers={recycle.layers}: the MTP head has one block: {other}")
    if recycle.taps:
        raise CheckpointError(f"{where}: recycle.taps={list(recycle.taps)}: the MTP head takes one state only: {other}")
    if recycle.confidence:
        raise CheckpointError(f"{where}: recycle.confidence=true: the MTP head has no confidence layer: {other}")
    if model.qk_norm or model.rope.unrotated_layers:
        setting = "qk_norm" if model.qk_norm else "rope.unrotated_layers"
        raise CheckpointError(f"{where}: model.{setting}: a Qwen2 block has no such setting: {other}")
    if model.dim_per_head * model.heads != model.hidden:
        raise CheckpointError(
            f"{where}: model.head_dim={model.dim_per_head}: a Qwen2 block has hidden / heads "
            f"({model.hidden} / {model.heads}): {other}"
        )
    for name, shape in source.shapes.items():
        try:
            mimo_name(name)
        except KeyError:
            raise CheckpointError(f"{where}: {name}: the MTP head has no such tensor: {other}") from None
        if name == "recycle.projection.weight" and tuple(shape) != (model.hidden, 2 * model.hidden):
            raise CheckpointError(f"{where}: {name} {list(shape)}: the MTP head's takes one state only: {other}")


def zero_biases(model: ModelConfig, recycle: RecycleConfig) -> dict[str, tuple[int, ...]]:
    """Returns shapes of the biases that a Qwen2 block has and the model has not, by canonical name."""
    if model.qkv_bias:
        return {}
    shapes = whole_shapes(model.model_copy(update={"qkv_bias": True}), recycle)
    return {name: shape for name, shape in shapes.items() if name.endswith(".bias")}


def write_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns config.json. dtype: torch's name."""
    tree = write_model(model.model_copy(update={"qkv_bias": True}), dtype)
    return tree | {"architectures": [ARCHITECTURE], "num_nextn_predict_layers": 1}


def describe_head(source: Source, before_norm: bool) -> dict[str, Any]:
    """Returns the content of recycle.json, which other programs ignore."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "recycle": recycle_settings(source.recycle),
        "qkv_bias": source.model.qkv_bias,
        "before_norm": before_norm,
        "provenance": provenance(),
    }


def read_head(folder: Path, config: Mapping[str, Any]) -> Head | None:
    """Returns the head of a folder in the MiMo layout, None for a folder in another one. config: its config.json.

    Without recycle.json, it is a module of depth 1 with biases. Raises CheckpointError for an invalid recycle.json, and
    for more than one head.
    """
    if config.get("architectures") != [ARCHITECTURE]:
        return None
    count = config.get("num_nextn_predict_layers")
    if type(count) is not int or count != 1:
        raise CheckpointError(f"{folder}: num_nextn_predict_layers={count!r}: only one MTP head is supported")
    path = folder / MODULE_CONFIG
    if not path.is_file():
        return Head(RecycleConfig(layers=1), qkv_bias=True, before_norm=False)
    tree = read_json(path)
    found = (tree.get("format"), tree.get("version"))
    if found != (_FORMAT, _VERSION):
        raise CheckpointError(f"{path}: format {found[0]!r}, version {found[1]!r}; must be {_FORMAT!r} and {_VERSION}")
    for key in ("qkv_bias", "before_norm"):
        if not isinstance(tree.get(key), bool):
            raise CheckpointError(f"{path}: {key}={tree.get(key)!r}: must be true or false")
    try:
        recycle = build_section(RecycleConfig, tree.get("recycle") or {})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if recycle.layers != 1:
        raise CheckpointError(f"{path}: recycle.layers={recycle.layers}: must be 1")
    return Head(recycle, tree["qkv_bias"], tree["before_norm"])
