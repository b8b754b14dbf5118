"""What is printed of several runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.training.reporting.runs_table import summarise_runs


@pytest.mark.parametrize(
    "said",
    [
        "lost contact with another rank ([/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed)",
        "[bold]not[/italic] markup :fire: \\",
    ],
)
def test_an_error_may_say_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str], said: str) -> None:
    """A summary that ends in an error of its own, or prints another text, because a run's error reads like markup."""
    for name, text in (("a[/b]", said), ("c", "short")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "error.txt").write_text(text + "\n")
    assert not summarise_runs([str(tmp_path / "a[/b]"), str(tmp_path / "c")], as_json=False)
    out = capsys.readouterr().out
    assert said[:20] in out.partition("not finished")[0]
    assert f"not finished: {tmp_path}/a[/b]: {said}" in out.splitlines()


def test_a_long_error_leaves_the_table_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of hundreds of lines, one word each, because one run failed with a long error; or an error cut for good."""
    monkeypatch.chdir(tmp_path)
    said = "a very long error " * 30 + "\nof two lines"
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, "error.txt").write_text(said)
    summarise_runs(["one", "two"], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "a very" in line and not line.startswith("not finished")]) == 2
    assert len(lines) == 3 + 2 + 1 + 2, "a line for a run, its frame, and the whole error below"
    assert lines[-1] == f"not finished: two: {' '.join(said.split())}"
