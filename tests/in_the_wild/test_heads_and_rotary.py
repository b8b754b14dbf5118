"""A tied head that differs from the embedding, and the precedence of rotary settings: logits as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.recognition import open_source
from tests.in_the_wild.folders import CLOSE, edit_json, edit_tensors, gap, ours, theirs
from tests.unit.checkpoint.families import LLAMA3, save

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHORT = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
"""llama3 without its original length."""


def test_a_head_that_differs_is_kept(tmp_path: Path) -> None:
    """Prevents a trained head from being replaced by the embedding because config.json says that they are tied."""
    save("llama_tied", tmp_path / "original")
    edit_tensors(tmp_path / "original", {HEAD: torch.randn(300, 48, generator=torch.Generator().manual_seed(0))})
    expected = theirs(tmp_path / "original")
    source = open_source(tmp_path / "original")
    assert not source.model.tied_embeddings and "lm_head.weight differs from the embedding: kept" in source.notes[0]
    assert gap(ours(source), expected) < CLOSE
    convert(str(tmp_path / "original"), str(tmp_path / "portable"), Conversion("portable"))
    result = convert(str(tmp_path / "portable"), str(tmp_path / "back"), Conversion("hf"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False
    assert not result.notes and gap(theirs(tmp_path / "back"), expected) < 1e-6


def test_an_equal_head_is_dropped(tmp_path: Path) -> None:
    """Prevents a second copy of the embedding that training would let drift apart."""
    save("llama_tied", tmp_path / "original")
    embedding = load_file(tmp_path / "original" / "model.safetensors")[EMBEDDING]
    edit_tensors(tmp_path / "original", {HEAD: embedding.clone()})
    source = open_source(tmp_path / "original")
    assert source.model.tied_embeddings and not source.notes
    assert gap(ours(source), theirs(tmp_path / "original")) < CLOSE


def test_a_tied_head_without_the_embedding(tmp_path: Path) -> None:
    """Prevents a refusal of files that store the shared tensor under the head's name."""
    save("llama_tied", tmp_path / "original")
    path = tmp_path / "original" / "model.safetensors"
    tensors = load_file(path)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, path, metadata={"format": "pt"})
    assert gap(ours(tmp_path / "original"), theirs(tmp_path / "original")) < CLOSE


def test_an_untied_model_without_a_head(tmp_path: Path) -> None:
    """Prevents a random head, and a refusal that does not say what to do."""
    save("llama_tied", tmp_path / "original")
    edit_json(tmp_path / "original" / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight; .* set tie_word_embeddings to true"):
        open_source(tmp_path / "original")


@pytest.mark.parametrize(
    ("changes", "drop"),
    [
        ({"rope_parameters": SHORT, "original_max_position_embeddings": 32}, ()),
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 64}, ()),
        ({"rope_scaling": SHORT, "original_max_position_embeddings": 16, "rope_theta": 100.0}, ("rope_parameters",)),
        ({"rope_parameters": SHORT}, ()),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_scaling": LLAMA3}, ()),
        ({"rope_parameters": LLAMA3, "rope_scaling": {}}, ()),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 100.0}, ()),
        ({"rope_parameters": {"rope_theta": 50.0}, "rope_theta": 100.0}, ()),
        ({"rope_parameters": {"rope_type": "linear", "type": "llama3", "factor": 2.0}}, ()),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 100.0}, ("rope_parameters",)),
        ({"original_max_position_embeddings": 16}, ("rope_parameters",)),
    ],
)
def test_rotary_settings_have_transformers_precedence(
    tmp_path: Path, changes: dict[str, Any], drop: tuple[str, ...]
) -> None:
    """Prevents other wavelengths than the model was trained with: the same key may be in three places."""
    save("llama", tmp_path)
    edit_json(tmp_path / "config.json", drop, **changes)
    expected = theirs(tmp_path)
    source = open_source(tmp_path)
    assert gap(ours(source), expected) < CLOSE
    convert(str(tmp_path), str(tmp_path / "portable"), Conversion("portable"))
    convert(str(tmp_path / "portable"), str(tmp_path / "back"), Conversion("hf"))
    assert gap(theirs(tmp_path / "back"), expected) < 1e-6


def test_an_overridden_setting_is_reported(tmp_path: Path) -> None:
    """Prevents a contradiction in config.json from being resolved without a word."""
    save("llama", tmp_path)
    edit_json(
        tmp_path / "config.json",
        rope_scaling={"type": "llama3", "rope_theta": 9.0} | SHORT,
        rope_theta=7.0,
        original_max_position_embeddings=64,
    )
    notes = "\n".join(open_source(tmp_path).notes)
    assert "rope_scaling is used and rope_parameters ignored" in notes
    assert "rope_scaling.rope_theta=500000.0 is used, not rope_theta=7.0" in notes
    edit_json(tmp_path / "config.json", rope_scaling=SHORT, original_max_position_embeddings=None)
    with pytest.raises(CheckpointError, match="missing original_positions"):
        open_source(tmp_path)
