"""Converts config.json of the supported architectures to our model section, and back.

All are pre-norm decoders with RMSNorm, rotary embeddings (halves rotated), SwiGLU and grouped-query attention; they differ in
biases, norms of queries and keys, layers without rotary embedding, and defaults. Any other setting that changes the computation
raises a CheckpointError that names it: if it were ignored, the model would run and compute wrong results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.huggingface.fields import check_fields, suspicious
from recycle_ds.checkpoint.huggingface.layer_types import UNROTATED, WINDOW, read_unrotated, read_window
from recycle_ds.checkpoint.huggingface.rotary import RENAMED, read_rope, write_scaling
from recycle_ds.checkpoint.size_limits import check_sizes
from recycle_ds.config import ConfigError, ModelConfig, build_section


@dataclass(frozen=True)
class Family:
    """One supported `model_type`. Defaults are those of transformers for a config without the key."""

    model_type: str
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    unrotated: bool = False
    """Whether some layers have no rotary embedding."""
    kv_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    tied: bool = False
    theta: float = 10_000.0


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM", kv_heads=8),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, kv_heads=32),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True, kv_heads=32, head_dim=128),
        Family("smollm3", "SmolLM3ForCausalLM", unrotated=True, kv_heads=4, tied=True, theta=2e6),
    )
}
_SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
_TIED, _GROUPS = "tie_word_embeddings", "num_key_value_heads"
_FILE_KEYS = {field: key for field, key in _SIZES.items() if field != key} | {
    "kv_heads": _GROUPS,
    "tied_embeddings": _TIED,
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
    **RENAMED,
}
_OUR_KEY = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, sorted(_FILE_KEYS, key=len, reverse=True)))})(?!\w)")
_NUMBERS = (*_SIZES.values(), _GROUPS, "head_dim", "rms_norm_eps", "initializer_range")


def read_model(tree: Mapping[str, Any], where: str) -> tuple[ModelConfig, list[str]]:
    """Returns the model section of a config.json, and notes on what differs from the file.

    where: path for error messages. Raises CheckpointError for an invalid or unsupported config.
    """
    family = FAMILIES.get(str(tree.get("model_type")))
    if family is None:
        reasons = suspicious(tree, "")
        why = f", nor are {', '.join(reasons[:4])}" if reasons else ""
        raise CheckpointError(
            f"{where}: model_type={str(tree.get('model_type'))[:60]!r} is not supported{why}; supported are "
            f"{', '.join(FAMILIES)}"
        )
    notes = check_fields(tree, family.model_type, where)
    missing = [key for key in _SIZES.values() if tree.get(key) is None]
    if missing:
        raise CheckpointError(f"{where}: missing {', '.join(missing)}")
    _check_numbers(tree, where)
    groups = tree.get(_GROUPS, family.kv_heads)
    rope, rope_notes = read_rope(tree, family.theta, where)
    fields: dict[str, Any] = {field: tree[key] for field, key in _SIZES.items()} | {
        "kv_heads": tree[_SIZES["heads"]] if groups is None else groups,
        "head_dim": tree.get("head_dim", family.head_dim),
        "norm_epsilon": tree.get("rms_norm_eps", 1e-6),
        "tied_embeddings": tree.get(_TIED, family.tied),
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "init_std": tree.get("initializer_range", 0.02),
        "rope": rope,
    }
    model = _build(fields, where)
    if family.unrotated:
        unrotated = read_unrotated(tree, model.layers, where)
        model = _build(fields | {"rope": rope | {"unrotated_layers": unrotated}}, where)
    window, window_notes = read_window(tree, family.model_type, model.layers, where)
    notes += rope_notes + window_notes
    if window is None or window >= model.max_positions:
        return model, notes
    notes.append(f"{WINDOW}={window}: max_positions reduced from {model.max_positions} to {window}")
    return model.model_copy(update={"max_positions": window}), notes


def _build(fields: dict[str, Any], where: str) -> ModelConfig:
    """Raises CheckpointError that names the file's keys, not ours."""
    try:
        model = build_section(ModelConfig, fields)
        check_sizes(model, where)
    except (ConfigError, CheckpointError) as error:
        text = _OUR_KEY.sub(lambda key: _FILE_KEYS[key[0]], str(error).removeprefix(f"{where}: "))
        raise CheckpointError(f"{where}: {text}") from None
    return model


def _check_numbers(tree: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for a boolean in place of a number, which Python would accept as 1 or 0, and for the reverse."""
    for key in _NUMBERS:
        if isinstance(tree.get(key), bool):
            raise CheckpointError(f"{where}: {key}={tree[key]!r}: must be a number")
    if not isinstance(tree.get(_TIED, False), bool):
        raise CheckpointError(f"{where}: {_TIED}={tree[_TIED]!r}: must be true or false")


def write_model(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns config.json of a plain base model of the first family that has its parts. dtype: torch's name.

    Raises CheckpointError if no family combines them.
    """
    family = _family_of(config)
    tree: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: getattr(config, field) for field, key in _SIZES.items()},
        _GROUPS: config.kv_heads,
        "head_dim": config.dim_per_head,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        _TIED: config.tied_embeddings,
        "initializer_range": config.init_std,
        "rope_theta": config.rope.theta,
        "rope_scaling": write_scaling(config),
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family.model_type != "qwen2":
        tree |= {"attention_bias": False}
    if family.model_type in ("llama", "smollm3"):
        tree |= {"mlp_bias": False}
    if family.unrotated:
        tree |= {UNROTATED: [int(layer not in config.rope.unrotated_layers) for layer in range(config.layers)]}
    return tree


def _family_of(config: ModelConfig) -> Family:
    parts = (config.qkv_bias, config.qk_norm, bool(config.rope.unrotated_layers))
    for family in FAMILIES.values():
        if (family.qkv_bias, family.qk_norm, family.unrotated) == parts:
            return family
    raise CheckpointError(
        f"no family in transformers combines model.qkv_bias={config.qkv_bias}, model.qk_norm={config.qk_norm} and "
        f"model.rope.unrotated_layers={list(config.rope.unrotated_layers)}: convert to portable or megatron instead"
    )
