"""The draft vocabulary of a recycle module through conversions, runs and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.conversion.options import TARGETS
from recycle_ds.checkpoint.loading import load_model
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import RecycleError
from recycle_ds.data.errors import DataError
from recycle_ds.data.token_files import TokenFileWriter
from recycle_ds.data.token_ranking import RANKING
from recycle_ds.data.tokenizer import Tokenizer
from tests.unit.checkpoint.conversion_cases import model_folder


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model with a recycle module and without a draft vocabulary, and token files with its tokenizer."""
    folder = model_folder(tmp_path / "plain")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    with TokenFileWriter(tmp_path / "first", tokenizer, "first") as writer:
        writer.add([7] * 5 + [3] * 4 + [9] * 2)
    with TokenFileWriter(tmp_path / "second", tokenizer, "second") as writer:
        writer.add([9] * 4 + [250])
    convert(str(folder), str(tmp_path / "model"), Conversion("hf", recycle_layers=1, seed=1))
    return str(tmp_path / "model")


def _ids(folder: Path) -> list[int] | None:
    found = load_model(str(folder)).model.draft_ids
    return None if found is None else found.tolist()


def test_the_most_frequent_tokens_survive_every_format(model: str, tmp_path: Path) -> None:
    """Prevents a draft vocabulary of other tokens than the most frequent ones, and one that a conversion loses or changes."""
    assert _ids(Path(model)) is None
    prefixes = (str(tmp_path / "first"), str(tmp_path / "second"))
    convert(model, str(tmp_path / "hf"), Conversion("hf", draft_vocabulary=3, rank_tokens=prefixes))
    assert _ids(tmp_path / "hf") == [3, 7, 9]
    for target in TARGETS:
        out = tmp_path / f"to-{target}"
        convert(str(tmp_path / "hf"), str(out), Conversion(target))
        assert convert(str(out), str(tmp_path / f"back-{target}"), Conversion("hf")).recycle.draft_vocabulary == 3
        assert _ids(tmp_path / f"back-{target}") == [3, 7, 9], target
    # another size needs no data: the ranking has all tokens
    convert(str(tmp_path / "to-portable"), str(tmp_path / "two"), Conversion("portable", draft_vocabulary=2))
    assert _ids(tmp_path / "two") == [7, 9]
    convert(str(tmp_path / "two"), str(tmp_path / "none"), Conversion("hf", draft_vocabulary=0))
    assert _ids(tmp_path / "none") is None


def test_a_vocabulary_that_the_module_was_trained_on_can_be_removed(model: str, tmp_path: Path) -> None:
    """Prevents a module that was trained on its draft vocabulary alone, as the shipped one, from keeping it for ever."""
    prefixes = (str(tmp_path / "first"), str(tmp_path / "second"))
    convert(model, str(tmp_path / "trained"), Conversion("hf", draft_vocabulary=3, rank_tokens=prefixes))
    path = tmp_path / "trained" / "recycle.json"
    tree = json.loads(path.read_text())
    assert tree["recycle"].get("draft_vocabulary") == 3
    tree["recycle"]["draft_vocabulary_in_training"] = True
    path.write_text(json.dumps(tree))
    assert convert(
        str(tmp_path / "trained"), str(tmp_path / "same"), Conversion("hf")
    ).recycle.draft_vocabulary_in_training
    convert(str(tmp_path / "trained"), str(tmp_path / "none"), Conversion("hf", draft_vocabulary=0))
    assert _ids(tmp_path / "none") is None
    assert not open_source(tmp_path / "none").recycle.draft_vocabulary_in_training


@pytest.mark.parametrize(
    ("conversion", "words"),
    [
        (Conversion("hf", draft_vocabulary=-1), "--draft-vocabulary -1: must be at least 0"),
        (Conversion("hf", rank_tokens=("x",)), "--rank-tokens x: only with --draft-vocabulary N"),
        (Conversion("hf", draft_vocabulary=301), "--draft-vocabulary 301: the model's vocabulary has 300 tokens"),
        (
            Conversion("hf", draft_vocabulary=9),
            "--draft-vocabulary 9: .* has no token_ranking.json, .* give --rank-tokens PREFIX",
        ),
        (Conversion("hf", draft_vocabulary=9, rank_tokens=("x",)), "no such token file: x.bin"),
    ],
)
def test_impossible_vocabularies_are_refused(model: str, tmp_path: Path, conversion: Conversion, words: str) -> None:
    """Prevents a traceback, a half-written folder, and a draft vocabulary of arbitrary tokens."""
    with pytest.raises(RecycleError, match=words) as caught:
        convert(model, str(tmp_path / "out"), conversion)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_smaller_vocabulary_is_drafted_as_a_whole(model: str, tmp_path: Path) -> None:
    """Prevents a shipped configuration from failing on a model with fewer tokens than its draft vocabulary."""
    out = tmp_path / "out"
    convert(model, str(out), Conversion("hf", draft_vocabulary=300, rank_tokens=(str(tmp_path / "first"),)))
    settings = json.loads((out / "recycle.json").read_text())
    settings["recycle"]["draft_vocabulary"] = 8192
    (out / "recycle.json").write_text(json.dumps(settings))
    assert _ids(out) == list(range(300))


def test_a_lost_ranking_stops_a_conversion(model: str, tmp_path: Path) -> None:
    """Prevents a conversion that succeeds and makes a folder that cannot be loaded."""
    source = tmp_path / "source"
    convert(model, str(source), Conversion("hf", draft_vocabulary=3, rank_tokens=(str(tmp_path / "first"),)))
    (source / RANKING).unlink()
    with pytest.raises(DataError, match="missing, but the model has a draft vocabulary"):
        convert(str(source), str(tmp_path / "out"), Conversion("portable"))
    assert not (tmp_path / "out").exists()
    convert(str(source), str(tmp_path / "out"), Conversion("portable", draft_vocabulary=0))
    assert _ids(tmp_path / "out") is None


def test_a_folder_of_ours_is_read_without_notes(model: str, tmp_path: Path) -> None:
    """Prevents every load of a folder with a module from warning of an index that lists just its one file."""
    convert(model, str(tmp_path / "out"), Conversion("hf"))
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert tuple(open_source(tmp_path / "out").notes) == ()


def test_a_model_without_a_module_is_refused(tmp_path: Path) -> None:
    """Prevents a setting without effect."""
    with pytest.raises(CheckpointError, match="plain: has no recycle module: omit --draft-vocabulary 5"):
        convert(str(model_folder(tmp_path / "plain")), str(tmp_path / "out"), Conversion("hf", draft_vocabulary=5))


@pytest.mark.parametrize("content", ["", "[]", '{"format": "x"}', "tokens", "repeated", "large", "short"])
def test_a_damaged_ranking_is_refused(model: str, tmp_path: Path, content: str) -> None:
    """Prevents drafts from a vocabulary that is not the model's."""
    out = tmp_path / "out"
    convert(model, str(out), Conversion("hf", draft_vocabulary=3, rank_tokens=(str(tmp_path / "first"),)))
    tree = json.loads((out / RANKING).read_text())
    wrong = {"tokens": ["a"], "repeated": [1, 1], "large": [300], "short": [7, 3]}.get(content)
    (out / RANKING).write_text(content if wrong is None else json.dumps(tree | {"tokens": wrong}))
    with pytest.raises(DataError, match=f"{RANKING}: (cannot be read|must |has 2 tokens)") as caught:
        load_model(str(out))
    assert "\n" not in str(caught.value)


def test_the_ids_are_ascending(model: str, tmp_path: Path) -> None:
    """Prevents ids in another order than the rows of the draft head, which are searched by bisection."""
    out = tmp_path / "out"
    convert(model, str(out), Conversion("hf", draft_vocabulary=40, rank_tokens=(str(tmp_path / "first"),)))
    ids = load_model(str(out)).model.draft_ids
    assert ids is not None and len(ids) == 40 and bool((ids[1:] > ids[:-1]).all()) and ids.dtype == torch.int64
