"""Compiling and loading the kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native import library
from recycle_ds.inference.parameters import SamplingParams
from tests.unit.inference.native.kernels import bf16_model, needs_kernels


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and a process that has not loaded the kernels yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._loaded.cache_clear()
    yield tmp_path / "recycle_ds"
    library._loaded.cache_clear()


@needs_kernels
def test_compiled_once_and_again_if_damaged(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a compilation at every start, and a damaged library from switching the kernels off for good."""
    library.kernels()
    (built,) = fresh.glob("kernels-*.so")
    assert sorted(fresh.iterdir()) == [built], "nothing unfinished is left"
    before = built.stat().st_mtime_ns
    library._loaded.cache_clear()
    library.kernels()
    assert built.stat().st_mtime_ns == before
    other = fresh.with_name("other") / "recycle_ds" / built.name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"not a library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(other.parent.parent))
    library._loaded.cache_clear()
    library.kernels()
    assert other.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no C compiler CC='no-such-compiler'"), ("false", "false failed|cannot compile")],
)
def test_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiler: str, reason: str
) -> None:
    """Prevents a machine without a working compiler from not decoding at all, or slowly without a word."""
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(library.KernelsUnavailable, match=reason):
        library.kernels()
    engine = local_engine(bf16_model(), max_batch=1)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: decoding without the compiled kernels: ")
    (answer,) = engine.add([1, 2], SamplingParams(max_new_tokens=4), "autoregressive")
    engine.finish([answer])
    assert len(answer.tokens) == 6


@needs_kernels
def test_an_unwritable_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prevents a cache folder that cannot be written from being an error."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "file"))
    library._loaded.cache_clear()
    try:
        found = library.kernels()
    finally:
        library._loaded.cache_clear()
    assert not Path(found._name).is_relative_to(tmp_path / "file"), "it was compiled elsewhere"
    assert callable(found.recycle_ds_run) and (tmp_path / "file").read_bytes() == b""


def test_models_that_the_kernels_do_not_support(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents sizes that the kernels would read beyond, and fp32, from being given to them."""
    odd = bf16_model(head_dim=24)
    assert StageWeights(odd).why_not_compiled == "channels of a head is 24, no multiple of 16"
    assert StageWeights(bf16_model(ffn=40)).why_not_compiled == "ffn is 40, no multiple of 16"
    assert "fp32" in str(StageWeights(bf16_model().float()).why_not_compiled)
    local_engine(odd, max_batch=1)
    assert "channels of a head is 24" in capsys.readouterr().err
