"""The command `report`: its arguments, its file, and what it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recycle_ds.config import RecycleError
from recycle_ds.report import published_checkpoints
from recycle_ds.training.reporting.run_report.runs import read_runs
from tests.runs import ROOT
from tests.unit.training.report_reading import run_command
from tests.unit.training.written_runs import evaluation, step, write_run


def test_what_is_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a traceback, an empty report, or a lost file, for wrong arguments."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), [step(1, 5.0)])
    Path("empty").mkdir()
    Path("mine.html").write_text("<p>mine</p>")
    cases = {
        ("nowhere",): "nowhere: no such folder; name the folder of a run (run_dir)",
        ("run/run.json",): "run/run.json: is a file; name the run's folder",
        (
            "empty",
        ): "empty: not the folder of a run: it has none of metrics.jsonl, run.json, summary.json, config.yaml, error.txt",
        ("run", "./run"): "run: named twice; name each run once",
        tuple(f"run{number}" for number in range(17)): "17 runs: a report compares at most 16; name fewer",
        ("run", "--output", "empty"): "--output empty: is a folder; name a file, such as empty/report.html",
        ("run", "--output", "x.pdf"): "--output x.pdf: the report is HTML; name a file that ends in .html",
        ("run", "--output", "mine.html"): "mine.html: exists and is not a report; name another file with --output",
        (
            "run",
            "--output",
            "mine.html/x.html",
        ): "mine.html/x.html: mine.html is a file, not a folder; name another file with --output",
    }
    for arguments, message in cases.items():
        code, out, err = run_command(list(arguments), capsys)
        assert (code, out) == (2, "") and err.startswith(f"error: {message}") and err.count("\n") == 1, err
    assert Path("mine.html").read_text() == "<p>mine</p>"
    with pytest.raises(RecycleError):
        read_runs(["nowhere"], published_checkpoints)


def test_the_command_writes_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents reports in unexpected places, and a second report that cannot replace the first."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), [step(1, 5.0)], end="{")
    write_run(Path("b"), [step(1, 5.0)])
    for _ in range(2):
        code, out, err = run_command(["a"], capsys)
        assert (code, out.partition(",")[0]) == (0, "a/report.html: 1 run")
        assert err.startswith("note: a: metrics.jsonl: the last line is incomplete") and err.count("\n") == 1
    assert run_command(["a", "b"], capsys)[:2][1].startswith("report.html: 2 runs")
    assert run_command(["a", "b", "--output", "new/folder/x.html"], capsys)[0] == 0
    Path("stray.json").touch()
    code, out, err = run_command(["a", "stray.json"], capsys)
    assert (code, out.partition(",")[0]) == (0, "a/report.html: 1 run"), "a file beside folders, as of runs/*"
    assert err.startswith("note: not a folder, left out: stray.json\n")
    assert sorted(str(path) for path in Path().rglob("*.html")) == ["a/report.html", "new/folder/x.html", "report.html"]


def test_a_report_is_written_without_torch(tmp_path: Path) -> None:
    """Prevents a report that takes seconds to start because it imports torch."""
    write_run(tmp_path / "run", [step(1, 5.0)])
    code = f"""
import sys
from recycle_ds.cli import main
try:
    main(["report", {str(tmp_path / "run")!r}])
except SystemExit as end:
    print([name for name in ("torch", "deepspeed", "megatron", "transformers") if name in sys.modules], end.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout + done.stderr


def test_paths_that_cannot_be_used_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a traceback for a name that is too long, and a command that waits for ever for a FIFO's writer."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), [step(1, 5.0), evaluation(1, 4.0)])
    os.mkfifo("pipe.html")
    long = "x" * 300
    for arguments, message in (
        ([long], f"{long}: File name too long; name another path"),
        (["run", "--output", f"{long}.html"], f"{long}.html: File name too long; name another path"),
        (["run", "--output", f"{'y' * 245}.html"], f"{'y' * 245}.html: cannot be written (File name too long)"),
        (["run", "--output", "pipe.html"], "pipe.html: exists and is not a report; name another file"),
        (["run", "pipe.html"], "pipe.html: is a file; name the run's folder"),
    ):
        code, out, err = run_command(arguments, capsys)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {message}"), err
    assert sorted(os.listdir()) == ["pipe.html", "run"]
