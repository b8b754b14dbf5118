"""tools/convert_checkpoint.py, from arguments to exit code: results, messages, a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.checkpoint.conversion.comparison import compare
from recycle_ds.checkpoint.conversion.options import TARGETS
from recycle_ds.checkpoint.recognition import open_source
from tests.unit.checkpoint.conversion_cases import full_disk, model_folder, one_line_error, run_tool, start_tool


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("source") / "original")


def test_round_trip(original: Path, tmp_path: Path) -> None:
    """Prevents a command that works from Python but not from a shell, or that prints nothing about its result."""
    done = start_tool("convert_checkpoint", original, "portable", "--to", "portable", folder=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "weights in 30 tensors, portable" in done.stdout
    done = run_tool("convert_checkpoint", tmp_path / "portable", tmp_path / "back", "--to", "hf", "--shard-gib", 5e-5)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    assert compare(original, tmp_path / "back")["equal"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "portable"]


def test_with_a_new_module(original: Path, tmp_path: Path) -> None:
    """Prevents a newly initialised module from being reported as a trained one."""
    done = run_tool(
        "convert_checkpoint",
        original,
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
def test_a_full_disk(original: Path, tmp_path: Path, target: str) -> None:
    """Prevents a traceback from safetensors or torch, and an incomplete folder, on a full disk."""
    with full_disk(40_000):
        module = ("--recycle-layers", 1) if target == "vllm" else ()
        done = run_tool("convert_checkpoint", original, tmp_path / "out", "--to", target, *module)
    assert one_line_error(done) == (
        f"error: {tmp_path / 'out'}: cannot be written (File too large); nothing is left there"
    )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_a_separate_process(original: Path, tmp_path: Path) -> None:
    """Prevents a signal that ends the command before it prints its error, and other output of a library on stderr."""
    with full_disk(40_000):
        done = start_tool("convert_checkpoint", original, "out", "--to", "megatron", folder=tmp_path)
    assert one_line_error(done) == "error: out: cannot be written (File too large); nothing is left there"
    assert not list(tmp_path.iterdir())


def test_invalid_arguments(original: Path, tmp_path: Path) -> None:
    """Prevents a traceback or exit code 1 for a mistake in the command line."""
    (tmp_path / "file").write_text("text")
    for arguments, message in (
        ((original, tmp_path / "file" / "out", "--to", "hf"), "cannot be written (Not a directory)"),
        ((original, tmp_path / "out", "--to", "gguf"), "--to gguf: must be one of hf, portable, megatron, vllm"),
        ((original, tmp_path / "out", "--to", "hf", "--shard-gib", "nan"), "--shard-gib nan: must be above 0"),
        ((original, tmp_path / "out", "--to", "hf", "--shard-gib", "1e308"), "must be above 0, and at most 1,048,576"),
        (
            (original, tmp_path / "out", "--to", "megatron", "--shard-gib", "1"),
            "--to megatron: its files follow the layout",
        ),
        ((original, "", "--to", "hf"), "the argument"),
        ((original, tmp_path / "out", "--to", "hf", "--seed", "1"), "--seed 1: only with --recycle-layers"),
        ((original, tmp_path / "out"), "Missing option '--to'"),
    ):
        assert message in one_line_error(run_tool("convert_checkpoint", *arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
