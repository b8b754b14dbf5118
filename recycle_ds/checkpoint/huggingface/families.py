"""Converts config.json of the supported architectures to our model section, and back.

All are pre-norm decoders with RMSNorm, rotary embeddings (halves rotated), SwiGLU and grouped-query attention; they differ in
biases and defaults. Any other setting that changes the computation raises a CheckpointError that names it: if it were ignored,
the model would run and compute wrong results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.size_limits import check_sizes
from recycle_ds.config import ConfigError, ModelConfig, build_section


@dataclass(frozen=True)
class Family:
    """One supported `model_type`."""

    model_type: str
    architecture: str
    qkv_bias: bool
    sliding_window: int | None
    """Default of transformers for a config without the key."""


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", qkv_bias=False, sliding_window=None),
        Family("mistral", "MistralForCausalLM", qkv_bias=False, sliding_window=4096),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, sliding_window=None),
    )
}
_PARTIAL = "partial_rotary_factor"
# A key that is present must have one of these values: any other value changes the computation.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    _PARTIAL: (1.0, 1, None),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
}
_SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
_TIED = "tie_word_embeddings"
_NUMBERS = (*_SIZES.values(), "num_key_value_heads", "head_dim", "rms_norm_eps", "initializer_range", "rope_theta")
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_model(tree: Mapping[str, Any], where: str) -> tuple[ModelConfig, list[str]]:
    """Returns the model section of a config.json, and notes on limits that the source does not have.

    where: path for error messages. Raises CheckpointError for an invalid or unsupported config.
    """
    family = FAMILIES.get(str(tree.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"{where}: model_type={tree.get('model_type')!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    for key, allowed in _FIXED.items():
        if key in tree and tree[key] not in allowed:
            raise CheckpointError(f"{where}: {key}={tree[key]!r} is not supported, only {allowed[0]!r}")
    missing = [key for key in _SIZES.values() if tree.get(key) is None]
    if missing:
        raise CheckpointError(f"{where}: missing {', '.join(missing)}")
    _check_numbers(tree, where)
    groups = tree.get("num_key_value_heads")
    fields: dict[str, Any] = {field: tree[key] for field, key in _SIZES.items()} | {
        "kv_heads": tree[_SIZES["heads"]] if groups is None else groups,
        "head_dim": tree.get("head_dim"),
        "norm_epsilon": tree.get("rms_norm_eps", 1e-6),
        "tied_embeddings": tree.get(_TIED, False),
        "qkv_bias": family.qkv_bias,
        "init_std": tree.get("initializer_range", 0.02),
        "rope": _read_rope(tree, where),
    }
    try:
        model = build_section(ModelConfig, fields)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    check_sizes(model, where)
    window = _window(tree, family, where)
    if window is None or window >= model.max_positions:
        return model, []
    note = f"sliding_window={window}: max_positions reduced from {model.max_positions} to {window}"
    return model.model_copy(update={"max_positions": window}), [note]


def _check_numbers(tree: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for a boolean in place of a number, which Python would accept as 1 or 0, and for the reverse."""
    for key in _NUMBERS:
        if isinstance(tree.get(key), bool):
            raise CheckpointError(f"{where}: {key}={tree[key]!r}: must be a number")
    if not isinstance(tree.get(_TIED, False), bool):
        raise CheckpointError(f"{where}: {_TIED}={tree[_TIED]!r}: must be true or false")


def _window(tree: Mapping[str, Any], family: Family, where: str) -> int | None:
    """Returns the attention window in positions, None if it is unlimited. Raises CheckpointError for an invalid one."""
    window = tree.get("sliding_window", family.sliding_window)
    if family.model_type != "mistral" or window is None:  # without use_sliding_window, Qwen2 ignores the key
        return None
    if type(window) is not int or window < 1:
        raise CheckpointError(f"{where}: sliding_window={window!r}: must be a whole number above 0, or null")
    return window


def _read_rope(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (earlier releases)."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(tree.get(name), Mapping | None):
            raise CheckpointError(f"{where}: {name}={tree[name]!r}: must be an object")
    scaling = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    for key in _ROPE_NUMBERS:
        if isinstance(scaling.get(key), bool):
            raise CheckpointError(f"{where}: {key}={scaling[key]!r}: must be a number")
    if scaling.get(_PARTIAL) not in _FIXED[_PARTIAL]:
        raise CheckpointError(f"{where}: {_PARTIAL}={scaling[_PARTIAL]!r} is not supported, only 1.0")
    theta = scaling.get("rope_theta", tree.get("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"theta": theta}
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported, only default, linear and llama3")
    found = {"kind": kind, "factor": scaling.get("factor")}
    if kind == "llama3":
        found |= {
            "low_frequency_factor": scaling.get("low_freq_factor"),
            "high_frequency_factor": scaling.get("high_freq_factor"),
            "original_positions": scaling.get("original_max_position_embeddings", tree["max_position_embeddings"]),
        }
    absent = [key for key, value in found.items() if value is None]
    if absent:
        raise CheckpointError(f"{where}: rope type {kind!r}: missing {', '.join(absent)}")
    return {"theta": theta, "scaling": found}


def write_model(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns config.json of a plain base model: Qwen2 for model.qkv_bias, else LLaMA. dtype: torch's name."""
    family = FAMILIES["qwen2" if config.qkv_bias else "llama"]
    assert config.vocab_size is not None
    tree: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: getattr(config, field) for field, key in _SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim_per_head,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "rope_theta": config.rope.theta,
        "rope_scaling": _write_scaling(config),
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family.model_type == "llama":
        tree |= {"attention_bias": False, "mlp_bias": False}
    return tree


def _write_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope.scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }
