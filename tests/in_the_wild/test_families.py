"""Every supported family: published configurations, fields that are unknown, windows, and equal logits and tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.huggingface.families import FAMILIES, read_model
from recycle_ds.checkpoint.huggingface.fields import CHECKED, HONOURED, WITHOUT_EFFECT
from recycle_ds.checkpoint.loading import load_model
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import RecycleConfig
from recycle_ds.inference.loading import decoder_of
from recycle_ds.model.flops import parameters
from tests.in_the_wild.folders import CLOSE, TOKENS, byte_tokenizer, edit_json, gap, ours, theirs
from tests.runs import ROOT
from tests.unit.checkpoint.families import SHAPE, save

_LLAMA3 = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
# Model: the fields of its config.json that matter, some that are left over, and the published number of weights.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 3.2 1B": ({
        "model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": _LLAMA3,
        "rope_theta": 5e5, "tie_word_embeddings": True, "vocab_size": 128256, "use_cache": True,
    }, 1_235_814_400),
    "SmolLM2 135M": ({
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 1e5, "tie_word_embeddings": True, "vocab_size": 49152,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    }, 134_515_008),
    "Mistral 7B v0.3": ({
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 1e6, "sliding_window": None,
        "tie_word_embeddings": False, "vocab_size": 32768,
    }, 7_248_023_552),
    "Qwen2.5 0.5B": ({
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False,
        "use_sliding_window": False, "vocab_size": 151936,
    }, 494_032_768),
    "Qwen3 0.6B": ({
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e6, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    }, 596_049_920),
    "SmolLM3 3B": ({
        "model_type": "smollm3", "attention_bias": False, "hidden_size": 2048, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 4, "pretraining_tp": 2, "rope_theta": 5e6, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 128256,
    }, 3_075_098_624),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    """Prevents a refusal of a published model, and one of another size: a head or a bias too many, or another head width."""
    tree, weights = PUBLISHED[name]
    model, notes = read_model(tree, "config.json")
    assert parameters(model, RecycleConfig(layers=0)) == weights and not notes


def test_granite_is_refused_by_its_multipliers() -> None:
    """Prevents a refusal that only says "not supported", and multipliers that are ignored under another model_type."""
    multipliers = {
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
    }  # fmt: skip
    for model_type in ("granite", "llama"):
        with pytest.raises(CheckpointError) as caught:
            read_model(SHAPE | multipliers | {"model_type": model_type}, "config.json")
        assert all(f"{key}={value}" in str(caught.value) for key, value in multipliers.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_multiplier", 2), ("attn_logit_softcapping", 50.0), ("final_logit_soft_cap", 30.0),
        ("no_rope_layers", [1, 0, 1]), ("sliding_window", 16), ("window_size", 16), ("scale_depth", 1.4),
        ("logit_scale", 0.5), ("attn_scaling", 2.0),
        ("query_pre_attn_scalar", 256), ("use_qk_norm", True), ("clip_qkv", 8.0), ("qkv_bias", True),
        ("rope_interleaved", True),
        ("quantization_config", {"bits": 4}), ("compression_config", {"bits": 4}), ("partial_rotary_factor", 0.5),
    ],
)  # fmt: skip
def test_a_field_that_changes_the_computation(tmp_path: Path, key: str, value: Any) -> None:
    """Prevents a setting from being ignored because this package does not know it."""
    save("llama", tmp_path / "original")
    edit_json(tmp_path / "original" / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=re.escape(f"config.json: {key}={value}")) as caught:
        convert(str(tmp_path / "original"), str(tmp_path / "out"), Conversion("portable"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_multiplier", 1.0), ("residual_multiplier", 1), ("attn_logit_softcapping", None), ("sliding_window", None),
        ("use_sliding_window", False), ("max_window_layers", 28), ("no_rope_layers", []), ("use_qk_norm", False),
        ("layer_types", ["full_attention"] * 3), ("my_own_field", 3), ("attention_dropout", 0.5),
    ],
)  # fmt: skip
def test_a_field_that_is_off(tmp_path: Path, key: str, value: Any) -> None:
    """Prevents a refusal of fields that are left over, or switch something off."""
    save("llama", tmp_path)
    expected = ours(tmp_path)
    edit_json(tmp_path / "config.json", **{key: value})
    assert torch.equal(ours(tmp_path), expected) and not open_source(tmp_path).notes


def test_code_in_the_folder_is_reported(tmp_path: Path) -> None:
    """Prevents a model with code of its own from being computed as the plain family without a word."""
    save("llama", tmp_path)
    edit_json(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert open_source(tmp_path).notes == (
        "auto_map: the folder's own code is not run, the model is computed as a plain llama",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_every_field_of_transformers(family: str) -> None:
    """Prevents a field of a new release of transformers from being ignored without a decision."""
    from transformers import CONFIG_MAPPING

    assert set(CONFIG_MAPPING[family]().to_dict()) <= {*HONOURED, *CHECKED, *WITHOUT_EFFECT}


def test_the_document_has_the_table() -> None:
    """Prevents a table in docs/checkpoints.md that says something else than the code does."""
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \| ([^|]+) \| (honoured|checked|no effect)", text, re.MULTILINE)
    found = {
        field: (families.strip(), kind) for cell, families, kind in rows for field in re.findall("`([^`]+)`", cell)
    }
    expected = {field: (families, "honoured") for field, families in HONOURED.items()}
    expected |= dict.fromkeys(CHECKED, ("all", "checked"))
    expected |= dict.fromkeys(WITHOUT_EFFECT, ("all", "no effect"))
    assert found == expected
    assert ", ".join(FAMILIES) in text


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 3}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16, "no_rope_layers": [1, 1, 1]}),
    ],
)
def test_a_window_of_no_layer(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """Prevents a refusal, or a shorter context, for a window that no layer has."""
    save(name, tmp_path)
    edit_json(tmp_path / "config.json", ("layer_types", "no_rope_layers"))
    edit_json(tmp_path / "config.json", **changes)
    source = open_source(tmp_path)
    assert source.notes == ("use_sliding_window=true applies to no layer: all layers attend to everything",)
    assert source.model.max_positions == 128 and gap(ours(source), theirs(tmp_path)) < CLOSE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 3}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16}),
    ],
)
def test_a_window_limits_the_context(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """Prevents attention beyond the window: within it all layers attend to everything, and beyond it nothing is computed."""
    save(name, tmp_path)
    edit_json(tmp_path / "config.json", ("layer_types",))
    edit_json(tmp_path / "config.json", **changes)
    source = open_source(tmp_path)
    assert source.model.max_positions == 16
    assert source.notes[-1] == "sliding_window=16: max_positions reduced from 128 to 16"
    assert gap(ours(source, TOKENS[:, :16]), theirs(tmp_path)[:, :16]) < CLOSE


def test_types_of_layers_that_are_not_supported(tmp_path: Path) -> None:
    """Prevents linear or chunked attention from being computed as full attention."""
    save("qwen3", tmp_path)
    for types, words in (
        (["full_attention", "linear_attention", "full_attention"], "'linear_attention': supported are"),
        (["full_attention"] * 2, "must name the attention of each of the 3 layers"),
        (["full_attention", "sliding_attention", "full_attention"], "give no window"),
    ):
        edit_json(tmp_path / "config.json", layer_types=types)
        with pytest.raises(CheckpointError, match=words):
            open_source(tmp_path)


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_through_every_format(tmp_path: Path, name: str) -> None:
    """Prevents norms, layers without rotary embedding or a head width that one of the formats forgets."""
    save(name, tmp_path / "original")
    expected = theirs(tmp_path / "original")
    previous = tmp_path / "original"
    for target in ("portable", "megatron", "hf"):
        result = convert(str(previous), str(tmp_path / target), Conversion(target))
        assert gap(ours(result), expected) < CLOSE
        previous = tmp_path / target
    assert gap(theirs(tmp_path / "hf"), expected) < 1e-6


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "mistral", "qwen2"])
def test_the_engine_decodes_what_transformers_does(tmp_path: Path, name: str) -> None:
    """Prevents a decoding path of its own that forgets a norm, a bias or a layer without rotary embedding."""
    from transformers import AutoModelForCausalLM

    save(name, tmp_path / "original")
    byte_tokenizer(tmp_path / "original", *(f"<|{number}|>" for number in range(257, 300)))
    nothing = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    edit_json(tmp_path / "original" / "config.json", **nothing)
    edit_json(tmp_path / "original" / "generation_config.json", **nothing)
    prompt = [5, 6, 7, 8]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original").eval()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, 4:].tolist()
    if 256 in expected:
        expected = expected[: expected.index(256) + 1]
    convert(str(tmp_path / "original"), str(tmp_path / "module"), Conversion("portable", recycle_layers=1))
    decoder = decoder_of(load_model(str(tmp_path / "module")))
    for mode in ("autoregressive", "verified"):
        drafts = None if mode == "autoregressive" else 3
        found = decoder.generate(prompt, mode, max_new_tokens=24, draft_tokens=drafts)
        assert list(found.token_ids) == expected, mode


def test_parts_that_no_family_combines(tmp_path: Path) -> None:
    """Prevents a Hugging Face folder that computes something else than the model it was made of."""
    save("qwen3", tmp_path / "original")
    source = open_source(tmp_path / "original")
    from recycle_ds.checkpoint.huggingface.families import write_model

    combined = source.model.model_copy(update={"qkv_bias": True})
    with pytest.raises(
        CheckpointError, match=r"no family in transformers combines model\.qkv_bias=True, model\.qk_norm=True"
    ):
        write_model(combined, "float32")
