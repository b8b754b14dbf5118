"""The printed table of several runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.training.errors import TrainingError
from recycle_ds.training.reporting.runs_table import summarise_runs


@pytest.mark.parametrize(
    "error",
    [
        "lost contact with another rank ([/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed)",
        "[bold]not[/italic] markup :fire: \\",
    ],
)
def test_an_error_is_printed_verbatim(tmp_path: Path, capsys: pytest.CaptureFixture[str], error: str) -> None:
    """Prevents a summary that fails, or prints another text, because the error of a run looks like markup."""
    for name, text in (("a[/b]", error), ("c", "short")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "error.txt").write_text(text + "\n")
    assert not summarise_runs([str(tmp_path / "a[/b]"), str(tmp_path / "c")], as_json=False)
    out = capsys.readouterr().out
    assert error[:20] in out.partition("not finished")[0]
    assert f"not finished: {tmp_path}/a[/b]: {error}" in out.splitlines()


def test_a_long_error_leaves_the_table_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a table with hundreds of one-word lines because of a long error, and an error that is truncated."""
    monkeypatch.chdir(tmp_path)
    error = "a very long error " * 30 + "\nof two lines"
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, "error.txt").write_text(error)
    summarise_runs(["one", "two"], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "a very" in line and not line.startswith("not finished")]) == 2
    assert len(lines) == 3 + 2 + 1 + 2, "one line for each run, the frame, and the complete errors below"
    assert lines[-1] == f"not finished: two: {' '.join(error.split())}"


def test_files_among_the_runs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents `summarise_runs.py runs/*` from stopping at a file in the folder of runs."""
    (tmp_path / "one").mkdir()
    (tmp_path / "bench.json").touch()
    assert not summarise_runs([str(tmp_path / "bench.json"), str(tmp_path / "one")], as_json=False)
    printed = capsys.readouterr()
    assert "never started" in printed.out and printed.err == f"note: not a folder, left out: {tmp_path}/bench.json\n"
    with pytest.raises(TrainingError, match="no folder of a run"):
        summarise_runs([str(tmp_path / "bench.json")], as_json=False)
