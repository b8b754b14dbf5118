"""A run's settings and mesh are built once, before the ranks meet, and are passed as one argument."""

from __future__ import annotations

import ast
import errno
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from recycle_ds import pretrain
from recycle_ds.config import RunConfig, parse_config, resolve_deepspeed
from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.parallel.layout import Layout
from recycle_ds.parallel.mesh import Mesh, virtual_mesh
from recycle_ds.parallel.peers import MachineFault
from recycle_ds.training.run_context import RunContext
from tests.runs import ROOT, tiny_run


def parameters(function: ast.FunctionDef) -> set[str]:
    """Names of a function's parameters."""
    given = function.args
    return {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)}


def test_nothing_that_knows_the_device_is_passed_beside_it() -> None:
    """Prevents a mesh and its device from travelling side by side, where a call may mix up those of two runs."""
    knowing, found, functions = {"mesh", "engine", "team", "context"}, [], 0
    for file in sorted((ROOT / "recycle_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                functions += 1
                if "device" in parameters(node) and knowing & parameters(node):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert found == [] and functions > 1000


def test_a_run_cannot_change(tmp_path: Path) -> None:
    """Prevents a part of a run from replacing the settings that the others have read."""
    config = tiny_run(tmp_path, tmp_path / "run", model__vocab_size=64)
    context = RunContext(config, resolve_deepspeed(config, 1), Mesh())
    for name in ("config", "mesh", "job", "deepspeed_config"):
        with pytest.raises(FrozenInstanceError):
            setattr(context, name, None)
    assert context.taken_by() is None and context.job.folder is None


def test_a_layout_that_is_not_running_has_no_device() -> None:
    """Prevents a planner that allocates a part of a 70 B model."""
    assert (virtual_mesh(Layout(tensor=2), 1).device.type, Mesh().device.type) == ("meta", "cpu")


def unprepared(folder: Path, *overrides: str) -> RunConfig:
    """A run whose data do not exist yet, and are prepared by it."""
    tree: dict[str, Any] = tiny_run(folder / "data", folder / "run").model_dump(mode="json")
    texts = folder / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text("a text\n\nanother one\n")
    tree["data"]["prepare"] = {"source": str(texts), "output": str(folder / "data"), "tokenizer_vocab": 300}
    return parse_config(tree, overrides)


def test_a_vocabulary_that_is_too_small_is_found_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents an hour of tokenising for a run that its settings do not allow."""
    with pytest.raises(SystemExit) as ended:
        pretrain.run(unprepared(tmp_path, "model.vocab_size=299"))
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1)
    assert "model.vocab_size (299) is smaller than the tokenizer's vocabulary (300)" in err
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize(("number", "outcome"), [(errno.ESTALE, ""), (errno.EACCES, "failed\n")])
@pytest.mark.parametrize(("rank", "local_rank", "lines"), [(0, 0, 1), (1, 1, 0), (2, 0, 1)])
def test_a_tokenizer_that_cannot_be_read_for_now(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    outcome: str,
    rank: int,
    local_rank: int,
    lines: int,
) -> None:
    """Prevents a job that is not started again because a file server was away for a minute, ranks of one host that all print
    the error, and a host that ends without a word."""

    def unreachable(path: str) -> Tokenizer:
        try:
            raise OSError(number, "Stale file handle", path)
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error

    config, job = unprepared(tmp_path), tmp_path / "job"
    job.mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").touch()
    monkeypatch.setattr(Tokenizer, "load", unreachable)
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4, "RECYCLE_JOB_DIR": job}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(MachineFault if not outcome else SystemExit):
        pretrain.run(config)
    err = capsys.readouterr().err
    # rank 0 prints a MachineFault where the command ends
    expected = lines - (not rank and not outcome)
    assert err.count("\n") == err.count("cannot read the tokenizer") == expected
    assert [file.read_text() for file in job.glob("outcome")] == ([outcome] if outcome else [])
