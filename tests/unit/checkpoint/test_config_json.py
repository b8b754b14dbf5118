"""config.json with values of a wrong type: refused in one line, or read with their exact meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.files.checksums import read_json
from recycle_ds.checkpoint.huggingface.families import FAMILIES, read_model
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model.build import whole_shapes
from tests.unit.checkpoint.families import LLAMA3, SHAPE

BASE: dict[str, Any] = SHAPE | {"head_dim": 12, "tie_word_embeddings": True, "rope_theta": 1e4}
KEYS = [*SHAPE, "head_dim", "tie_word_embeddings", "rope_theta", "sliding_window"]
LAYER_KEYS = [
    "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers", "no_rope_layer_interval",
    "partial_rotary_factor", "original_max_position_embeddings",
]  # fmt: skip
ROPE_KEYS = [
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_type",
]
JUNK: list[Any] = [
    "32", "x", "", None, -1, 0, True, False, 0.5, 4.0, -1.5, float("nan"), float("inf"), 10**400, [], [4], {}, {"a": 1},
]  # fmt: skip


def read(tree: dict[str, Any]) -> tuple[ModelConfig, str]:
    """Returns the model and "", or an empty model and the one-line error."""
    try:
        model, _ = read_model(tree, "config.json")
    except CheckpointError as error:
        assert "\n" not in str(error) and str(error).startswith("config.json: "), str(error)
        return ModelConfig.model_construct(), str(error)
    whole_shapes(model, RecycleConfig(layers=0))
    return model, ""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", KEYS)
def test_values_of_a_wrong_type(family: str, key: str) -> None:
    """Prevents a stack trace from comparing a string with a number, and a model of one head for `true`."""
    for value in JUNK:
        model, refusal = read(BASE | {"model_type": family, key: value})
        if (
            isinstance(value, bool)
            and key != "tie_word_embeddings"
            and (key != "sliding_window" or family == "mistral")
        ):
            assert f"{key}={value}: must be" in refusal, (key, value)
        if not refusal and key in ("num_attention_heads", "head_dim") and value is not None:
            assert value in ("32", 4.0) or (key, value) == ("head_dim", None), (key, value)
        if not refusal and key == "tie_word_embeddings":
            assert model.tied_embeddings is value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", LAYER_KEYS)
def test_layer_settings_of_a_wrong_type(family: str, key: str) -> None:
    """Prevents a stack trace for settings that differ by layer, and a window or a layer that is read as another one."""
    for used in (True, False, None):
        for value in [*JUNK, [1, 0, 1], [1, 0], ["full_attention"] * 3, ["sliding_attention"] * 3, [None] * 3]:
            tree = BASE | {"model_type": family, "use_sliding_window": used, "sliding_window": 32, key: value}
            model, refusal = read({name: one for name, one in tree.items() if one is not None or name == key})
            if not refusal:
                assert model.max_positions in (32, 128)
                assert family == "smollm3" or not model.rope.unrotated_layers


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rope_values_of_a_wrong_type(name: str, kind: str) -> None:
    """Prevents a stack trace, and a boolean read as a number, for the nested RoPE settings."""
    complete = LLAMA3 | {"rope_type": kind}
    for key in ROPE_KEYS:
        for value in JUNK:
            _, refusal = read(BASE | {"model_type": "llama", name: complete | {key: value}})
            if isinstance(value, bool):
                assert str(value) in refusal or (kind == "linear" and key not in ("factor", "rope_theta")), (key, value)
    for value in JUNK:
        _, refusal = read(BASE | {"model_type": "llama", name: value})
        if not isinstance(value, dict | None):
            assert f"{name}={value!r}: must be an object" in refusal


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": "32"}, "sliding_window='32': must be a whole number above 0, or null"),
        ({"sliding_window": 0}, "sliding_window=0: must be"),
        ({"sliding_window": 32.0}, "sliding_window=32.0: must be"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings='many'"),
        ({"vocab_size": None}, "missing vocab_size"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True: must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': must be true or false"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported, only 1.0"),
        ({"rope_scaling": []}, "rope_scaling=[]: must be an object"),
    ],
)
def test_the_error_names_the_value(changes: dict[str, Any], words: str) -> None:
    """Prevents an error that does not name the key and the value, and a value that is read as a different one."""
    _, refusal = read(BASE | {"model_type": "mistral"} | changes)
    assert words in refusal


def test_null_is_the_default_where_transformers_says_so() -> None:
    """Prevents a null that means multi-head attention from being refused."""
    model, refusal = read(
        BASE | {"model_type": "mistral", "num_key_value_heads": None, "sliding_window": None, "head_dim": None}
    )
    assert not refusal and (model.kv_heads, model.max_positions, model.dim_per_head) == (4, 128, 12)
    assert read(BASE | {"model_type": "qwen2", "sliding_window": 32})[0].max_positions == 128


def test_numbers_that_python_does_not_read(tmp_path: Path) -> None:
    """Prevents a stack trace for an integer with more digits than Python converts."""
    path = tmp_path / "config.json"
    path.write_text('{"num_hidden_layers": ' + "7" * 5000 + "}")
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and "digit" in str(caught.value)
