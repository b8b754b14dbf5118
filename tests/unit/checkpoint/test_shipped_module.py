"""Attaching a recycle module to the folder of its model, and the module that ships with the package."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.conversion.shipped_module import SMOLLM2, attach, check_shipped, has_module, is_same_module
from recycle_ds.checkpoint.huggingface.module import read_module
from recycle_ds.checkpoint.loading import load_model
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.data.errors import DataError
from recycle_ds.data.token_files import TokenFileWriter
from recycle_ds.data.token_ranking import RANKING
from recycle_ds.data.tokenizer import Tokenizer
from tests.unit.checkpoint.conversion_cases import model_folder

_FILES = ("recycle.json", "recycle.safetensors", RANKING)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model without a module."""
    return model_folder(tmp_path / "plain")


@pytest.fixture
def module(plain: Path, tmp_path: Path) -> Path:
    """The files of a module for it, in bf16, with a draft vocabulary of three tokens."""
    tokenizer = Tokenizer.load(plain / "tokenizer.json")
    with TokenFileWriter(tmp_path / "text", tokenizer, "text") as writer:
        writer.add([7] * 5 + [3] * 4 + [9] * 2)
    settings = {"recycle_layers": 1, "seed": 1, "dtype": "bf16"}
    convert(str(plain), str(tmp_path / "fresh"), Conversion("hf", **settings))
    ranked = Conversion("hf", draft_vocabulary=3, rank_tokens=(str(tmp_path / "text"),))
    convert(str(tmp_path / "fresh"), str(tmp_path / "complete"), ranked)
    folder = tmp_path / "module"
    folder.mkdir()
    for name in _FILES:
        shutil.copyfile(tmp_path / "complete" / name, folder / name)
    return folder


def test_an_attached_module_is_loaded_with_the_model(plain: Path, module: Path) -> None:
    """Prevents a module that is attached with other weights or drafts, a changed model, and a folder of which other programs
    would read the module's file as the model's."""
    before = (plain / "model.safetensors").read_bytes()
    attach(plain, module)
    loaded = load_model(str(plain)).model
    assert loaded.recycle_layers == 1 and loaded.draft_ids is not None and loaded.draft_ids.tolist() == [3, 7, 9]
    assert (plain / "model.safetensors").read_bytes() == before
    for name in _FILES:
        assert (plain / name).read_bytes() == (module / name).read_bytes()
    source = open_source(str(plain))
    name = next(name for name in source.shapes if name.startswith("recycle."))
    assert source.dtype(name) == torch.bfloat16
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"} and not source.notes
    assert has_module(plain) and is_same_module(plain, module)
    assert [path.name for path in plain.iterdir() if path.name.startswith(".tmp-")] == []
    with pytest.raises(CheckpointError, match="already has a recycle module"):
        attach(plain, module)


def test_an_interrupted_attachment_is_completed(plain: Path, module: Path) -> None:
    """Prevents a folder that no command accepts after a kill between the module's files."""
    shutil.copyfile(module / "recycle.safetensors", plain / "recycle.safetensors")
    attach(plain, module)
    assert load_model(str(plain)).model.recycle_layers == 1


@pytest.mark.parametrize("fault", ["another model", "damaged", "no ranking", "no module", "other taps"])
def test_a_module_that_does_not_fit_changes_nothing(plain: Path, module: Path, tmp_path: Path, fault: str) -> None:
    """Prevents a folder with a module of another model, or with half of one, which fails when it is decoded."""
    words = {
        "another model": "does not fit",
        "damaged": "does not match its checksum",
        "no ranking": "missing, but the model has a draft vocabulary",
        "no module": "no recycle.json",
        "other taps": "taps block 9",
    }
    if fault == "another model":
        plain = model_folder(tmp_path / "other", "qwen2")
    elif fault == "damaged":
        content = bytearray((module / "recycle.safetensors").read_bytes())
        content[-1] ^= 1
        (module / "recycle.safetensors").write_bytes(content)
    elif fault == "other taps":
        tree = json.loads((module / "recycle.json").read_text())
        tree["recycle"]["taps"] = [0, 9]
        (module / "recycle.json").write_text(json.dumps(tree))
    else:
        (module / (RANKING if fault == "no ranking" else "recycle.json")).unlink()
        if fault == "no module":
            (module / "recycle.safetensors").unlink()
    before = sorted(os.listdir(plain))
    with pytest.raises((CheckpointError, DataError)) as caught:
        attach(plain, module)
    assert words[fault] in str(caught.value)
    assert sorted(os.listdir(plain)) == before


@pytest.mark.parametrize("name", _FILES)
def test_a_folder_in_the_place_of_a_file_is_reported(plain: Path, module: Path, name: str) -> None:
    """Prevents a traceback, and a half attached module, where a file of the module would replace a folder."""
    (plain / name).mkdir()
    before = sorted(os.listdir(plain))
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: is a folder"):
        attach(plain, module)
    assert sorted(os.listdir(plain)) == before


def test_a_failed_attachment_keeps_the_ranking_of_the_model(
    plain: Path, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents the loss of a model's own token ranking when the disk fails between the module's files."""
    (plain / RANKING).write_text("the model's own")
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "recycle.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output error"):
        attach(plain, module)
    assert (plain / RANKING).read_text() == "the model's own"
    assert not any(path.name.startswith((".tmp-", "recycle")) for path in plain.iterdir())


def test_a_package_without_its_module_is_named(tmp_path: Path) -> None:
    """Prevents a download of minutes before the error that the module to attach is missing."""
    with pytest.raises(CheckpointError, match=r"recycle\.safetensors and recycle\.json missing"):
        check_shipped(tmp_path)


def test_the_shipped_module_is_intact() -> None:
    """Prevents a release with a damaged module, one above the limit of 10 MB, or one without its ranking or card."""
    check_shipped(SMOLLM2)
    recycle, files = read_module(SMOLLM2)
    assert list(files) == ["recycle.safetensors"] and files["recycle.safetensors"].bytes <= 10_000_000
    assert recycle.layers == 1 and recycle.draft_vocabulary == 8192
    assert (SMOLLM2 / RANKING).is_file() and "Apache-2.0" in (SMOLLM2 / "README.md").read_text(encoding="utf-8")
