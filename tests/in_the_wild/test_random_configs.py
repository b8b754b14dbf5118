"""Random valid configurations of every family: logits equal to transformers', read from the same config.json."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.huggingface.families import FAMILIES
from recycle_ds.checkpoint.recognition import open_source
from tests.in_the_wild.folders import CLOSE, gap, ours, theirs

VOCABULARY, LENGTH = 50, 24
TOKENS = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@st.composite
def rotary(draw: st.DrawFn) -> dict[str, Any]:
    """Rotary settings as releases of transformers write them: in a block of one of two names, or at the top level."""
    kind = draw(st.sampled_from(["default", "linear", "llama3"]))
    block: dict[str, Any] = {draw(st.sampled_from(["type", "rope_type"])): kind}
    tree: dict[str, Any] = {}
    if kind != "default":
        block["factor"] = draw(st.sampled_from([2.0, 4.0, 8]))
    if kind == "llama3":
        block |= _LLAMA3
    if draw(st.booleans()):
        (block if draw(st.booleans()) else tree)["rope_theta"] = draw(st.sampled_from([100.0, 10000, 5e5]))
    if kind == "llama3" and draw(st.booleans()):
        (block if draw(st.booleans()) else tree)["original_max_position_embeddings"] = draw(st.sampled_from([8, 16]))
    if kind == "default" and draw(st.booleans()):
        return tree
    return tree | {draw(st.sampled_from(["rope_scaling", "rope_parameters"])): block}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    heads, layers = draw(st.sampled_from([2, 4])), draw(st.integers(1, 3))
    tree: dict[str, Any] = {
        "model_type": family, "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": draw(st.sampled_from([24, 40])), "max_position_embeddings": 64,
        "num_key_value_heads": draw(st.sampled_from([1, 2] if family == "mistral" else [1, 2, None])),
        "initializer_range": 0.3,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    optional: dict[str, st.SearchStrategy[Any]] = {
        "head_dim": st.sampled_from([8, 12, 32]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-5, 0.1]),
        "tie_word_embeddings": st.booleans(),
        "attention_dropout": st.just(0.5),
        "use_cache": st.booleans(),
    }
    if family == "mistral":
        optional["sliding_window"] = st.sampled_from([8, 128, None])
    if family in ("qwen2", "qwen3", "smollm3"):
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        optional |= {
            "use_sliding_window": st.just(True),
            "sliding_window": st.sampled_from([8, 64]),
            "max_window_layers": st.integers(0, 3),
            "layer_types": st.lists(kinds, min_size=layers, max_size=layers),
        }
    if family == "smollm3":
        optional["no_rope_layers"] = st.lists(st.sampled_from([0, 1]), min_size=layers, max_size=layers)
        optional["no_rope_layer_interval"] = st.integers(1, 3)
    for key, values in optional.items():
        if draw(st.booleans()):
            tree[key] = draw(values)
    if "sliding_attention" in (tree.get("layer_types") or ()):  # without a window, transformers fails
        tree |= {"use_sliding_window": True, "sliding_window": 8}
    return tree | draw(rotary())


@given(tree=configs(), seed=st.integers(0, 100))
def test_equal_logits(tree: dict[str, Any], seed: int) -> None:
    """Prevents a combination of settings that is read in another way than transformers reads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(tree))
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.copy_(torch.rand_like(parameter) + 0.5)
            expected = model(TOKENS).logits
        tied = model.config.tie_word_embeddings
        tensors = {key: value for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        source = open_source(folder)
        length = min(LENGTH, source.model.max_positions)
        assert length == LENGTH or any("sliding_window" in note for note in source.notes)
        assert source.model.tied_embeddings == tied
        assert gap(ours(source, TOKENS[:, :length]), expected[:, :length]) < CLOSE
        convert(str(folder), str(folder.with_name("portable")), Conversion("portable"))
        convert(str(folder.with_name("portable")), str(folder.with_name("back")), Conversion("hf"))
        assert gap(theirs(folder.with_name("back"), TOKENS[:, :length]), expected[:, :length]) < CLOSE
