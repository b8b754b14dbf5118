"""Megatron-LM's arguments that are missing, of a wrong type, or change the computation."""

from __future__ import annotations

from typing import Any

import pytest

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.megatron.arguments import read_arguments
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model.build import whole_shapes
from tests.unit.checkpoint.megatron_cases import MODEL, MODULE, arguments_of

ARGS = vars(arguments_of(MODEL, MODULE)) | {"tokenizer_type": "GPTSentencePieceTokenizer"}
READ = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings", "padded_vocab_size",
    "group_query_attention", "num_query_groups", "kv_channels", "vocab_size", "make_vocab_size_divisible_by", "tokenizer_type",
    "norm_epsilon", "layernorm_epsilon", "untie_embeddings_and_output_weights", "add_qkv_bias", "init_method_std",
    "mtp_num_layers", "rotary_base", "use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor",
    "qk_layernorm", "no_rope_freq",
)  # fmt: skip
FLAGS = (
    "group_query_attention",
    "untie_embeddings_and_output_weights",
    "add_qkv_bias",
    "use_rope_scaling",
    "qk_layernorm",
)
JUNK: list[Any] = [
    ...,
    None,
    "x",
    "",
    "7",
    -1,
    0,
    1,
    True,
    False,
    0.5,
    float("nan"),
    10**400,
    [],
    [4],
    (1,),
    "<Tensor>",
]


def read(**changes: Any) -> tuple[ModelConfig | None, RecycleConfig | None, str]:
    """Returns model and module, or the one-line error; arguments with the value ... are omitted."""
    args = {key: value for key, value in (ARGS | changes).items() if value is not ...}
    try:
        model, recycle, _ = read_arguments(args, "common.pt", None)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(error).startswith("common.pt: "), str(error)
        return None, None, str(error)
    whole_shapes(model, recycle)
    return model, recycle, ""


@pytest.mark.parametrize("key", READ)
def test_values_of_a_wrong_type(key: str) -> None:
    """Prevents a stack trace, and True read as 1."""
    assert read()[:2] == (MODEL.model_copy(update={"head_dim": 8}), MODULE)
    for value in JUNK:
        _, _, refusal = read(**{key: value})
        if isinstance(value, bool) and key not in (*FLAGS, "tokenizer_type"):
            assert f"{key}={value}" in refusal, (key, value)
        if key in FLAGS and not isinstance(value, bool) and value not in (None, ...):
            assert f"{key}={value!r}: must be True or False" in refusal


def test_missing_arguments_are_listed() -> None:
    """Prevents a stack trace for grouped-query attention without the number of groups."""
    for absent in (None, ...):
        assert (
            read(num_query_groups=absent, num_layers=absent)[2]
            == "common.pt: missing in args: num_layers, num_query_groups"
        )
        model, _, refusal = read(group_query_attention=absent, num_query_groups=absent)
        assert not refusal and model is not None and model.kv_heads == model.heads == 4


@pytest.mark.parametrize("key", ["rotary_base", "norm_epsilon", "rope_scaling_factor", "make_vocab_size_divisible_by"])
def test_zero_is_not_the_default(key: str) -> None:
    """Prevents an explicit zero from being replaced by the default."""
    assert "=0: " in read(**{key: 0, "use_rope_scaling": True})[2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("softmax_scale", 0.5),
        ("softmax_type", "learnable"),
        ("apply_residual_connection_post_layernorm", True),
        ("layernorm_zero_centered_gamma", True),
        ("apply_layernorm_1p", True),
        ("attention_output_gate", True),
        ("qk_l2_norm", True),
        ("window_size", (128, 0)),
        ("rotary_interleaved", True),
        ("rotary_percent", 0.5),
        ("activation_func_clamp_value", 7.0),
        ("glu_linear_offset", 1.0),
        ("num_moe_experts", 4),
        ("heterogeneous_block_specs", True),
        ("multi_latent_attention", True),
        ("use_mup", True),
    ],
)
def test_settings_that_change_the_computation(key: str, value: Any) -> None:
    """Prevents ignored settings that change the model's results but not the names and shapes of its tensors."""
    assert f"{key}={value!r} is not supported, only " in read(**{key: value})[2]


def test_layers_without_rotary_embedding() -> None:
    """Prevents a layer that is rotated although Megatron skips it, and settings that Megatron refuses."""
    for given, expected in ((2, (1, 3)), (4, (3,)), ([0, 1, 1, 0], (1, 2)), (None, ()), ([0, 0, 0, 0], ())):
        model, _, refusal = read(no_rope_freq=given, mtp_num_layers=None)
        assert not refusal and model is not None and model.rope.unrotated_layers == expected
    for wrong in (3, 0, True, "2", [1, 0], [2, 0, 0, 0]):
        assert f"no_rope_freq={wrong}: must divide the 4 layers" in read(no_rope_freq=wrong, mtp_num_layers=None)[2]
    assert "together with an MTP layer" in read(no_rope_freq=2, mtp_num_layers=1)[2]


def test_the_list_covers_megatrons_configuration() -> None:
    """Prevents a new setting of megatron-core from being ignored: each must be read, refused or without effect."""
    import dataclasses

    from megatron.core.transformer.transformer_config import TransformerConfig

    from recycle_ds.checkpoint.megatron import arguments

    handled = {*arguments._FIXED, *arguments._REQUIRED, *READ}
    words = (
        "scale", "clamp", "norm", "rotary", "rope", "window", "gate", "attention", "offset", "glu", "residual", "bias",
    )  # fmt: skip
    # these affect only training, precision or speed, need other settings, or are derived from the arguments above
    harmless = {
        "activation_func_fp8_input_store", "account_for_embedding_in_pipeline_split", "apply_query_key_layer_scaling",
        "apply_rope_fusion", "attention_backend", "attention_dropout", "attention_softmax_in_fp32", "bias_activation_fusion",
        "bias_dropout_fusion", "fp32_residual_connection", "fused_single_qkv_rope", "gated_linear_unit", "grad_scale_func",
        "kitchen_attention_backend", "log_max_attention_logit", "memory_efficient_layer_norm", "mrope_section",
            "persist_layer_norm",
        "use_kitchen_attention", "window_attn_skip_freq",
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    unhandled = {
        name
        for name in fields - handled - harmless
        if any(word in name for word in words)
        and not name.startswith(("moe_", "fp8_", "fp4_", "dsa_", "mtp_", "cuda_"))
    }
    assert not unhandled
