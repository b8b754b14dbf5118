"""tools/convert_checkpoint.py from its arguments to its exit code: results, messages, a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.checkpoint.conversion.convert import TARGETS
from recycle_ds.checkpoint.conversion.inspection import compare
from recycle_ds.checkpoint.recognition import open_source
from tests.unit.checkpoint.conversion_cases import full_disk, model_folder, one_line_error, run_tool, start_tool


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("source") / "theirs")


def test_there_and_back(theirs: Path, tmp_path: Path) -> None:
    """A command that works from Python and not from a shell, or that says nothing of what it did."""
    done = start_tool("convert_checkpoint", theirs, "portable", "--to", "portable", folder=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "weights in 30 tensors, portable" in done.stdout
    done = run_tool("convert_checkpoint", tmp_path / "portable", tmp_path / "back", "--to", "hf", "--shard-gib", 5e-5)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    assert compare(theirs, tmp_path / "back")["equal"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "portable"]


def test_with_a_fresh_module(theirs: Path, tmp_path: Path) -> None:
    """A module that was drawn anew and taken for a trained one."""
    done = run_tool(
        "convert_checkpoint",
        theirs,
        tmp_path / "out",
        "--to",
        "hf",
        "--recycle-layers",
        1,
        "--recycle-depth",
        2,
        "--seed",
        5,
    )
    assert done.returncode == 0, done.stderr
    assert "note: recycle module of 1 layer(s) initialised with seed 5" in done.stdout
    assert "recycle module of 1 layer(s), hf" in done.stdout
    assert open_source(tmp_path / "out").recycle.depth == 2


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk(theirs: Path, tmp_path: Path, target: str) -> None:
    """A traceback of safetensors or torch, and a half-written folder, on a disk without room."""
    with full_disk(40_000):
        done = run_tool("convert_checkpoint", theirs, tmp_path / "out", "--to", target)
    assert one_line_error(done) == (
        f"error: {tmp_path / 'out'}: cannot be written (File too large); nothing is left there"
    )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_a_process_of_its_own(theirs: Path, tmp_path: Path) -> None:
    """A signal, or a library's own words on stderr, that ends the command before the line is told."""
    with full_disk(40_000):
        done = start_tool("convert_checkpoint", theirs, "out", "--to", "megatron", folder=tmp_path)
    assert one_line_error(done) == "error: out: cannot be written (File too large); nothing is left there"
    assert not list(tmp_path.iterdir())


def test_requests_that_cannot_be_met(theirs: Path, tmp_path: Path) -> None:
    """A traceback or exit code 1 for a mistake in the command line."""
    (tmp_path / "file").write_text("mine")
    for arguments, message in (
        ((theirs, tmp_path / "file" / "out", "--to", "hf"), "cannot be written (Not a directory)"),
        ((theirs, tmp_path / "out", "--to", "gguf"), "--to gguf: must be one of hf, portable, megatron"),
        ((theirs, tmp_path / "out", "--to", "hf", "--shard-gib", "nan"), "--shard-gib nan: must be above 0"),
        ((theirs, tmp_path / "out", "--to", "hf", "--seed", "1"), "--seed 1: only with --recycle-layers"),
        ((theirs, tmp_path / "out"), "Missing option '--to'"),
    ):
        assert message in one_line_error(run_tool("convert_checkpoint", *arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
