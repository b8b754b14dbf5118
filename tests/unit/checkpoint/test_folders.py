"""Errors for folders without a usable checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.portable.folders import (
    check_folder,
    check_model_folder,
    check_run_dir,
    resolve_checkpoint,
    step_folder,
)
from recycle_ds.checkpoint.recognition import open_source
from tests.unit.checkpoint.families import save


def test_a_damaged_newest_checkpoint_names_the_intact_one(tmp_path: Path) -> None:
    """Prevents a user from looking for the intact checkpoint of a run by trial."""
    save("llama_mha_wide_heads", tmp_path / "original")
    run_dir = tmp_path / "run"
    for step in (1, 2, 3):
        convert(str(tmp_path / "original"), str(step_folder(run_dir, step)), Conversion("portable"))
    shard = next(step_folder(run_dir, 3).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4] + b"none")
    (step_folder(run_dir, 2) / "manifest.json").write_text("{")
    for path in (run_dir, run_dir / "checkpoints"):
        with pytest.raises(CheckpointError) as caught:
            open_source(path)
        message = str(caught.value)
        assert "does not match its checksum" in message
        assert message.endswith(f"{step_folder(run_dir, 1)} is intact: name that folder")
    assert open_source(step_folder(run_dir, 1)).kind == "portable"
    with pytest.raises(CheckpointError) as caught:
        open_source(step_folder(run_dir, 3))
    assert "intact" not in str(caught.value), "the user has named this one"
    shutil.rmtree(step_folder(run_dir, 1))
    with pytest.raises(CheckpointError, match="the run has no intact checkpoint"):
        open_source(run_dir)


@pytest.mark.parametrize(("path", "advice"), [
    ("models/smollm2", "`python tools/fetch_smollm2.py models/smollm2` makes it"),
    ("owner/name", "`hf download owner/name --local-dir models/name`"),
    *((path, None) for path in ("runs/deno", "models/mine", "./owner/name", "/owner/name", "a/b/c", "mine", "here/mine")),
])  # fmt: skip
def test_a_missing_folder_comes_with_fitting_advice(
    path: str, advice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents advice to download a mistyped local path from a hub."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    with pytest.raises(CheckpointError) as caught:
        check_folder(path)
    message = str(caught.value)
    assert message.endswith("no such folder") if advice is None else advice in message


def test_a_folder_of_something_else_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    """Prevents six seconds of imports before a wrong folder is reported, a message that does not say which one would be right,
    and a folder of a supported format that is taken for something else."""
    for name in ("one", "two", "three", "four", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("readme.txt" if name == "notes" else "config.json")).touch()
    with pytest.raises(CheckpointError, match=r"notes: no checkpoint there \(looked for [^)]*\)$"):
        check_model_folder(tmp_path / "notes")
    with pytest.raises(CheckpointError) as caught:
        check_model_folder(tmp_path)
    inside = ", ".join(str(tmp_path / name) for name in ("four", "one", "three"))
    assert str(caught.value).endswith(f"; name a folder inside it: {inside} and 1 more")
    with pytest.raises(CheckpointError, match="no such folder"):
        check_model_folder(tmp_path / "none")
    for content in (
        "checkpoints",
        "iter_0000010",
        "mp_rank_00",
        "latest",
        "latest_checkpointed_iteration.txt",
        "model.safetensors",
    ):
        folder = tmp_path / f"with {content}"
        folder.mkdir()
        (folder / content).touch()
        check_model_folder(folder)


def test_a_run_without_a_checkpoint_is_named_as_such(tmp_path: Path) -> None:
    """Prevents a run that has just begun from being reported as no model at all."""
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="looked for"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "config.yaml").touch()
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match="this run has not saved a checkpoint yet"):
            resolve_checkpoint(path)


def test_an_unusable_run_dir_is_refused_and_a_usable_one_is_not_created(tmp_path: Path) -> None:
    """Prevents a check of the run folder that creates it, or that refuses a folder that can be created."""
    check_run_dir(str(tmp_path / "new" / "run"))
    check_run_dir(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for name in ("file", "file/run"):
        with pytest.raises(CheckpointError, match=r"cannot be created .*file is not a folder"):
            check_run_dir(str(tmp_path / name))
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="no permission to write"):
            check_run_dir(str(tmp_path / "closed" / "run"))
