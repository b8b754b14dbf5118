"""Tokenizers that do not fit their model: found by `inspect` and `convert`, not first by the one who decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.conversion.inspection import describe
from recycle_ds.data.token_ranking import write_ranking
from recycle_ds.data.tokenizer import Tokenizer
from tests.unit.checkpoint.conversion_cases import model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def both(folder: Path) -> list[str]:
    """The notes of `inspect`, which are also those of `convert`."""
    notes: list[str] = []
    convert(str(folder), str(folder.with_name("out")), Conversion("hf"), note=notes.append)
    found = describe(folder)["notes"]
    assert set(found) <= set(notes)
    return list(found)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_beside_the_weights(folder: Path, name: str) -> None:
    """Prevents exit code 0 for a folder whose tokenizer cannot be read."""
    (folder / name).write_text('{"a": ')
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
        describe(folder)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
        convert(str(folder), str(folder.with_name("out")), Conversion("portable"))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_damaged_ranking(folder: Path) -> None:
    """Prevents a ranking of draft tokens that is none from being found first when a module is trained with it."""
    (folder / "token_ranking.json").write_text("[1]")
    assert any("token_ranking.json: must be a recycle_ds token ranking" in note for note in both(folder))
    write_ranking(folder, list(range(300)))
    drafting = folder.with_name("drafting")
    convert(str(folder), str(drafting), Conversion("hf", recycle_layers=1, draft_vocabulary=8))
    assert not any("ranking" in note for note in describe(drafting)["notes"])
    (drafting / "token_ranking.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"token_ranking\.json: must be a recycle_ds token ranking"):
        describe(drafting)


def test_a_file_that_is_no_tokenizer(folder: Path) -> None:
    """Prevents exit code 0 for an object that the tokenizers library cannot read."""
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a valid tokenizer"):
        describe(folder)


def test_no_tokenizer(folder: Path) -> None:
    """Prevents a conversion that is silent about a model that cannot decode."""
    (folder / "tokenizer.json").unlink(missing_ok=True)
    assert both(folder) == ["no tokenizer.json: to decode with the model, copy its own file into the folder"]


def test_ids_that_the_model_does_not_have(folder: Path) -> None:
    """Prevents an end token that can never be chosen."""
    change(folder / "config.json", eos_token_id=[1, 70_000])
    assert any(
        "special tokens 70000 are named beside the weights, but the model has 300" in note for note in both(folder)
    )


def test_a_tokenizer_that_is_larger_than_the_vocabulary(folder: Path) -> None:
    """Prevents ids behind the embedding."""
    Tokenizer.train(["a tale of two cities, of three, and of four thousand more " * 9, "and others"], 270).save(folder)
    change(folder / "config.json", vocab_size=260)
    file = folder / "model.safetensors"
    tensors = {name: value[:260] if len(value) == 300 else value for name, value in load_file(file).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"format": "pt"})
    assert any("the tokenizer has 270 tokens, the model 260: to decode" in note for note in both(folder))
