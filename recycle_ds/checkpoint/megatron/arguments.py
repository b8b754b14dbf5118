"""Converts Megatron-LM's arguments (the `args` of common.pt) to our model section, and back.

An argument that changes the computation in a way that our model does not support raises a CheckpointError that names it: if it
were ignored, the model would run and compute wrong results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.size_limits import check_sizes
from recycle_ds.config import ConfigError, ModelConfig, RecycleConfig, build_section

# Must be present and have one of these values.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
}
_ABSENT = (
    "activation_func_clamp_value", "experimental_attention_variant", "heterogeneous_layers_config_encoded_json",
    "heterogeneous_layers_config_path", "hybrid_layer_pattern", "hybrid_override_pattern", "linear_attention_freq",
    "linear_attention_type", "num_experts", "num_moe_experts", "softmax_scale", "spec", "window_size",
)  # fmt: skip
_OFF = (
    "apply_layernorm_1p", "apply_residual_connection_post_layernorm", "attention_output_gate", "heterogeneous_block_specs",
    "is_hybrid_model", "layernorm_zero_centered_gamma", "mtp_use_repeated_layer", "multi_latent_attention", "qk_l2_norm",
    "quick_geglu", "rotary_interleaved", "squared_relu", "use_mup",
)  # fmt: skip
# Must have one of these values if present.
_FIXED: dict[str, tuple[Any, ...]] = {
    "rotary_percent": (1.0, None),
    "glu_linear_offset": (0.0, None),
    "softmax_type": ("vanilla", None),
    **dict.fromkeys(_ABSENT, (None,)),
    **dict.fromkeys(_OFF, (False, None)),
}
_SIZES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "ffn_hidden_size",
    "max_positions": "max_position_embeddings",
}
_PADDED, _GROUPED, _GROUPS = "padded_vocab_size", "group_query_attention", "num_query_groups"
_UNTIED, _BIAS, _NORMS, _SCALED, _DEPTH = (
    "untie_embeddings_and_output_weights",
    "add_qkv_bias",
    "qk_layernorm",
    "use_rope_scaling",
    "mtp_num_layers",
)
_FLAGS = (_GROUPED, _UNTIED, _BIAS, _NORMS, _SCALED)
# Read as numbers: booleans are refused, because Python would accept them as 1 and 0.
_NUMBERS = (
    *_SIZES.values(), _PADDED, _GROUPS, _DEPTH, "init_method_std", "kv_channels", "layernorm_epsilon",
    "make_vocab_size_divisible_by", "norm_epsilon", "rope_scaling_factor", "rotary_base", "rotary_seq_len_interpolation_factor",
    "vocab_size",
)  # fmt: skip
_LLAMA3 = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_positions": 8192}
"""Constants of Megatron's RotaryEmbedding."""
_UNROTATED = "no_rope_freq"
_EPSILON = 1e-5
"""Default of Megatron-LM."""
SEPARATE_DEPTHS = (
    "Megatron's MTP has separate weights for every depth, a recycle module has one set: only one layer is read"
)


def read_arguments(
    args: Mapping[str, Any], where: str, tokens: int | None
) -> tuple[ModelConfig, RecycleConfig, list[str]]:
    """Returns model section, recycle section and notes. tokens: vocabulary size of the tokenizer with the checkpoint, if any.

    Raises CheckpointError for missing, invalid or unsupported arguments.
    """
    _check(args, where)
    vocabulary, notes = _vocabulary(args, tokens)
    fields: dict[str, Any] = {field: args[key] for field, key in _SIZES.items()} | {
        "kv_heads": args[_GROUPS] if args.get(_GROUPED) else args[_SIZES["heads"]],
        "head_dim": args.get("kv_channels"),
        "vocab_size": vocabulary,
        "vocab_multiple": _first(args, ("make_vocab_size_divisible_by",), 128),
        "rope": _read_rope(args, where),
        "norm_epsilon": _first(args, ("norm_epsilon", "layernorm_epsilon"), _EPSILON),
        "tied_embeddings": not args.get(_UNTIED),
        "qkv_bias": bool(args.get(_BIAS)),
        "qk_norm": bool(args.get(_NORMS)),
        "init_std": _first(args, ("init_method_std",), 0.02),
    }
    depth = _first(args, (_DEPTH,), 0)
    if type(depth) is not int or depth not in (0, 1):
        raise CheckpointError(f"{where}: mtp_num_layers={depth!r}: {SEPARATE_DEPTHS}")
    model = _build(fields, where)
    check_sizes(model, where)
    unrotated = _read_unrotated(args, model.layers, where)
    if unrotated and depth:
        raise CheckpointError(f"{where}: {_UNROTATED}={args[_UNROTATED]!r} together with an MTP layer is not supported")
    if unrotated:
        model = _build(fields | {"rope": fields["rope"] | {"unrotated_layers": unrotated}}, where)
    return model, RecycleConfig(layers=depth), notes


def _build(fields: dict[str, Any], where: str) -> ModelConfig:
    try:
        return build_section(ModelConfig, fields)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _read_unrotated(args: Mapping[str, Any], layers: int, where: str) -> list[int]:
    """Returns the layers without rotary embedding: every n-th one, or those listed as 1."""
    found = args.get(_UNROTATED)
    if found is None:
        return []
    if type(found) is int and found > 0 and layers % found == 0:
        return list(range(found - 1, layers, found))
    if isinstance(found, list) and len(found) == layers and all(one in (0, 1) for one in found):
        return [layer for layer, skipped in enumerate(found) if skipped]
    raise CheckpointError(
        f"{where}: {_UNROTATED}={str(found)[:60]}: must divide the {layers} layers, or be a list with a 0 or 1 for each"
    )


def _check(args: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for arguments that are missing, of the wrong type or not supported."""
    wanted = (*_SIZES.values(), _PADDED, *_REQUIRED, *([_GROUPS] if args.get(_GROUPED) else []))
    missing = [key for key in wanted if args.get(key) is None]
    if missing:
        raise CheckpointError(f"{where}: missing in args: {', '.join(missing)}")
    for key, allowed in (_REQUIRED | _FIXED).items():
        if key in args and args[key] not in allowed:
            raise CheckpointError(f"{where}: {key}={args[key]!r} is not supported, only {allowed[0]!r}")
    for key in _FLAGS:
        if type(args.get(key)) not in (bool, type(None)):
            raise CheckpointError(f"{where}: {key}={args[key]!r}: must be True or False")
    for key in _NUMBERS:
        if isinstance(args.get(key), bool):
            raise CheckpointError(f"{where}: {key}={args[key]!r}: must be a number")


def _first(args: Mapping[str, Any], keys: tuple[str, ...], default: Any) -> Any:
    """Returns the first value that is given. None counts as not given; 0 is a value and is checked like any other."""
    return next((args[key] for key in keys if args.get(key) is not None), default)


def _vocabulary(args: Mapping[str, Any], tokens: int | None) -> tuple[int, list[str]]:
    """Returns the vocabulary size without padding, and a note if only the padded size is known."""
    padded = args[_PADDED]
    given = args.get("vocab_size")
    if given is not None and "Null" not in str(args.get("tokenizer_type")):
        return given, []
    if tokens is not None and isinstance(padded, int) and tokens <= padded:
        return tokens, []
    return padded, [
        f"vocabulary: {padded} tokens including Megatron's padding; neither args nor a tokenizer.json gives the size without it"
    ]


def _read_rope(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {"theta": _first(args, ("rotary_base",), 10_000.0)}
    factor = args.get("rotary_seq_len_interpolation_factor")
    if args.get(_SCALED):
        if factor is not None:
            raise CheckpointError(
                f"{where}: use_rope_scaling together with rotary_seq_len_interpolation_factor={factor!r}: only one is supported"
            )
        scaling = {"kind": "llama3", "factor": _first(args, ("rope_scaling_factor",), 8.0), **_LLAMA3}
        return found | {"scaling": scaling}
    return found if factor is None else found | {"scaling": {"kind": "linear", "factor": factor}}


def write_arguments(
    model: ModelConfig,
    recycle: RecycleConfig,
    padded: int,
    seq_length: int,
    dtype: torch.dtype,
    layout: tuple[int, int],
) -> dict[str, Any]:
    """Returns the arguments that --use-checkpoint-args reads and that its checks compare. layout: tensor and pipeline ranks.

    Raises CheckpointError for a rotary embedding that Megatron does not support.
    """
    unrotated = model.rope.unrotated_layers
    if unrotated and recycle.layers:
        raise CheckpointError(
            f"model.rope.unrotated_layers={list(unrotated)} with a module: Megatron's option for these layers does not cover "
            "an MTP layer; convert to portable or hf instead"
        )
    return {
        **{key: getattr(model, field) for field, key in _SIZES.items()},
        "seq_length": seq_length,
        "group_query_attention": model.kv_heads != model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.dim_per_head,
        "vocab_size": model.vocab_size,
        _PADDED: padded,
        "make_vocab_size_divisible_by": model.vocab_multiple,
        "tokenizer_type": "HuggingFaceTokenizer",
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": int(model.rope.theta) if model.rope.theta.is_integer() else model.rope.theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        **_write_scaling(model),
        _UNROTATED: [int(layer in unrotated) for layer in range(model.layers)] if unrotated else None,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "swiglu": True,
        "squared_relu": False,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_epsilon,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        _NORMS: model.qk_norm,
        "multi_latent_attention": False,
        "num_experts": None,
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": model.init_std,
        "mtp_num_layers": recycle.layers or None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "ckpt_format": "torch_dist",
        "tensor_model_parallel_size": layout[0],
        "pipeline_model_parallel_size": layout[1],
        "virtual_pipeline_model_parallel_size": None,
        "no_save_optim": True,
        "no_save_rng": True,
        "data_parallel_random_init": False,
    }


def _write_scaling(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope.scaling
    llama3 = scaling is not None and scaling.kind == "llama3"
    if scaling is not None and llama3:
        other = {key: getattr(scaling, key) for key, value in _LLAMA3.items() if getattr(scaling, key) != value}
        if other:
            shown = ", ".join(f"model.rope.scaling.{key}={value:g}" for key, value in other.items())
            fixed = ", ".join(f"{_LLAMA3[key]:g}" for key in other)
            raise CheckpointError(f"{shown}: fixed to {fixed} in Megatron's rotary embedding")
    return {
        "use_rope_scaling": llama3,
        "rope_scaling_factor": scaling.factor if scaling is not None and llama3 else 8.0,
        "rotary_seq_len_interpolation_factor": scaling.factor if scaling is not None and not llama3 else None,
    }


def unrestored(model: ModelConfig) -> list[str]:
    """Returns the Megatron-LM options that this model needs and --use-checkpoint-args does not set."""
    found = [] if model.norm_epsilon == _EPSILON else [f"--norm-epsilon {model.norm_epsilon:g}"]
    if model.qk_norm:
        found.append("--qk-layernorm")
    unrotated = model.rope.unrotated_layers
    if unrotated:
        found.append(f"--no-rope-freq [{','.join(str(int(one in unrotated)) for one in range(model.layers))}]")
    scaling = model.rope.scaling
    if scaling is not None and scaling.kind == "llama3":
        found.append(f"--use-rope-scaling --rope-scaling-factor {scaling.factor:g}")
    elif scaling is not None:
        found.append(f"--rotary-seq-len-interpolation-factor {scaling.factor:g}")
    return found
