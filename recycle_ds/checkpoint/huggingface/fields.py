"""Which fields of a config.json are honoured, checked or without effect; all others are judged by their name.

docs/checkpoints.md shows the same table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError

HONOURED = {
    "vocab_size": "all",
    "hidden_size": "all",
    "intermediate_size": "all",
    "num_hidden_layers": "all",
    "num_attention_heads": "all",
    "num_key_value_heads": "all",
    "head_dim": "all",
    "max_position_embeddings": "all",
    "rms_norm_eps": "all",
    "initializer_range": "all",
    "tie_word_embeddings": "all",
    "rope_parameters": "all",
    "rope_scaling": "all",
    "rope_theta": "all",
    "original_max_position_embeddings": "all",
    "bos_token_id": "all",
    "eos_token_id": "all",
    "pad_token_id": "all",
    "sliding_window": "mistral, qwen2, qwen3, smollm3",
    "use_sliding_window": "qwen2, qwen3, smollm3",
    "max_window_layers": "qwen2, qwen3, smollm3",
    "layer_types": "mistral, qwen2, qwen3, smollm3",
    "no_rope_layers": "smollm3",
    "no_rope_layer_interval": "smollm3",
}
"""Fields that are read, and the families that have them."""

CHECKED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, 1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "transformers_weights": (None,),
}
"""A field that is present must have one of these values: any other value changes the computation."""

WITHOUT_EFFECT = (
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "chunk_size_feed_forward", "dtype", "id2label",
    "is_encoder_decoder", "is_llama_config", "label2id", "model_type", "num_labels", "output_attentions",
    "output_hidden_states", "pretraining_tp", "problem_type", "return_dict", "torch_dtype", "transformers.js_config",
    "transformers_version", "use_cache",
)  # fmt: skip
"""Fields of training, of other programs, or of how transformers runs a model."""

_CHANGES_THE_MATHS = re.compile(
    r"multiplier|soft_?cap|no_?rope|window|scal(e|ing|ar)|qk_(layer_?)?norm|clip_qkv|_bias$|^layer_types$"
)


def check_fields(tree: Mapping[str, Any], model_type: str, where: str) -> list[str]:
    """Returns notes on fields that are not followed. Raises CheckpointError that names a field which changes the computation.

    A field that the family does not have is refused if its name says that it changes the computation, and its value does not
    switch it off.
    """
    for key, allowed in CHECKED.items():
        # transformers' Qwen2 has biases whatever the field says, and the tensors show them
        if key in tree and tree[key] not in allowed and (key, model_type) != ("attention_bias", "qwen2"):
            raise CheckpointError(f"{where}: {key}={tree[key]!r} is not supported, only {allowed[0]!r}")
    unknown = suspicious(tree, model_type)
    if unknown:
        raise CheckpointError(
            f"{where}: {', '.join(unknown)}: not a setting of {model_type} in transformers, and by its name changes the "
            "computation: remove it if the model was trained without"
        )
    code = tree.get("auto_map")
    if isinstance(code, Mapping) and any("CausalLM" in str(key) for key in code):
        return [f"auto_map: the folder's own code is not run, the model is computed as a plain {model_type}"]
    return []


def suspicious(tree: Mapping[str, Any], model_type: str) -> list[str]:
    """Returns `key=value` of the fields that the family does not have and that change the computation by their name."""
    known = {key for key, families in HONOURED.items() if families == "all" or model_type in families.split(", ")}
    found = [
        key
        for key, value in tree.items()
        if key not in known and key not in CHECKED and _CHANGES_THE_MATHS.search(key) and not _is_off(tree, key, value)
    ]
    return [f"{key}={str(tree[key])[:60]}" for key in found]


def _is_off(tree: Mapping[str, Any], key: str, value: Any) -> bool:
    """Whether a value switches a field off, or another field does."""
    if value is None or value is False or value in ({}, []):
        return True
    if "window" in key:  # max_window_layers and sliding_window are left over in models converted from Qwen2
        switch = tree.get("use_sliding_window")
        return switch is False or (switch is None and key == "max_window_layers" and not tree.get("sliding_window"))
    if key == "layer_types":
        return value in (["full_attention"] * len(value), None) if isinstance(value, list) else False
    return ("multiplier" in key or "scal" in key) and type(value) in (int, float) and value == 1
