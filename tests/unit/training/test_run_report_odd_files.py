"""The report of runs whose files are damaged, unfinished, or of a kind that no run writes."""

from __future__ import annotations

import html
import json
import math
import os
from pathlib import Path

import pytest

from recycle_ds.training.reporting.run_report.page import render
from recycle_ds.training.reporting.run_report.panels import panels
from recycle_ds.training.reporting.sessions import Session
from tests.unit.training.report_reading import page_data, panel, read, run_command, titles, values
from tests.unit.training.written_runs import STARTED, step, write_run


@pytest.mark.parametrize(
    ("end", "damaged", "incomplete"),
    [
        ('{"step": 3, "lo', 0, True),
        (json.dumps(step(3, 1.0)), 0, True),
        ("\x00\x00\n", 1, False),
        ('{"step": 3\n[1]\n7\n', 3, False),
        ('{"step": "3", "backbone_loss": 1}\n{"step": -1, "backbone_loss": 1}\n', 2, False),
        (f'{{"step": {10**400}, "backbone_loss": 1}}\n', 1, False),
        (f'{{"step": 3, "backbone_loss": {"9" * 5000}}}\n', 1, False),
        ("[" * 100_000 + "\n", 1, False),
    ],
)
def test_a_damaged_line_costs_no_other(tmp_path: Path, end: str, damaged: int, incomplete: bool) -> None:
    """Prevents one damaged or partial line from hiding the rest of a run, or from being left out without a word."""
    records = [{"step": 1, "backbone_loss": 5.0}, {"step": 2, "backbone_loss": 4.0}]
    (run,) = runs = read(write_run(tmp_path / "run", records, end=end))
    assert values(panel(runs, "Loss"), "backbone") == [5.0, 4.0]
    assert (run.metrics.damaged, run.metrics.incomplete) == (damaged, incomplete)
    assert len(run.notes) == 1 and "left out" in run.notes[0] and html.escape(run.notes[0]) in render(runs)


def test_values_of_other_types_are_gaps(tmp_path: Path) -> None:
    """Prevents a traceback, or NaN in the page's JSON, for values that are no finite numbers."""
    odd = {
        "backbone_loss": "x", "recycle_loss": [None, math.nan, math.inf], "grad_norm": True, "mfu": [0.5],
        "memory_gib": 10**400, "tokens_per_second": 1e300, "rank_seconds": [1], "tokens": {}, "time": {"a": 1},
    }  # fmt: skip
    runs = read(write_run(tmp_path / "run", [step(1, 5.0), {**step(2, 4.0), **odd}, step(3, 3.0)]))
    page = render(runs)
    loss = dict(zip(titles(page), page_data(page), strict=True))["Loss"]
    speed = dict(zip(titles(page), page_data(page), strict=True))["Tokens per second"]
    assert speed["series"][0]["values"] == [2001.0, None, 2003.0], "beyond fp32"
    assert [one["values"] for one in loss["series"]] == [[5.0, None, 3.0], [5.5, None, 3.5], [6.0, None, 4.0]]
    only_nan = read(write_run(tmp_path / "nan", [step(1, math.nan, recycle_loss=[])]))
    assert "Loss" not in [one.title for one in panels(only_nan)]
    render(only_nan)


FILES = ("metrics.jsonl", "run.json", "summary.json", "config.yaml")
ODD = '{"sessions": 3, "training": 4, "parameters_per_rank": 5, "anomalies": [], "restarts": "x", "steps": {}}'


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, "", "{", "[]", "\x00", ODD])
def test_a_missing_or_damaged_file_is_noted(tmp_path: Path, name: str, content: str | None) -> None:
    """Prevents a traceback, or a silent gap, for a run with a missing, empty or damaged file."""
    folder = write_run(tmp_path / "run", [{"step": 1, "backbone_loss": 5.0}, {"step": 2, "backbone_loss": 4.0}])
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    (run,) = runs = read(folder)
    page = html.unescape(render(runs))
    odd = content == ODD and name != "metrics.jsonl"  # an object, if not one that a run writes
    assert bool(run.notes) != odd and all(note in page for note in run.notes)
    assert name == "metrics.jsonl" or values(panel(runs, "Loss"), "backbone") == [5.0, 4.0]


def test_an_unfinished_run_without_evaluations(tmp_path: Path) -> None:
    """Prevents a report that fails, or claims an end, while a run trains; the next report has what was added."""
    running = [Session(STARTED, 0, 0)]
    folder = write_run(tmp_path / "run", [step(1, 5.0, recycle_loss=[])], sessions=running, end='{"step": 2, "lo')
    (run,) = runs = read(folder)
    page = render(runs)
    assert "running, or killed; last line 2026-09-21 14:13:21 UTC" in page
    assert "Not recorded: Validation loss, Acceptance, Tokens per full call" in page
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('ss": 1, "backbone_loss": 4.0}\n')
    assert values(panel(read(folder), "Loss"), "backbone") == [5.0, 4.0]
    assert run.notes != read(folder)[0].notes == ()


def test_names_and_texts_that_are_no_utf_8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Prevents a traceback for a lone surrogate in a run's files, or a run whose folder's name is not UTF-8."""
    event = {"event": "\ud800", "step": 2, "host": "\udfff"}
    folder = write_run(
        tmp_path / os.fsdecode(b"r\xfcn"), [step(1, 5.0), step(2, 4.0), event], config='a: "\\ud801"\n', end="{"
    )
    (folder / "run.json").write_text(json.dumps({"dtype": "\ud802"}))
    code, out, err = run_command([str(folder)], capfd)
    assert (code, "r\\udcfcn/report.html: 1 run" in out, "n: metrics.jsonl" in err) == (0, True, True)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f"\\u{number}" in page for number in ("d800", "d801", "d802", "dfff", "dcfc"))


def test_parts_whose_names_are_digits(tmp_path: Path) -> None:
    """Prevents a traceback for a part named by a digit that is no number, or by thousands of them."""
    parts = {"²": 1.0, "٣": 2.0, "9" * 5000: 3.0, "12": 4.0}
    records = [step(number, 5.0, seconds_by_part=parts) for number in (1, 2)]
    runs = read(write_run(tmp_path / "a", records), write_run(tmp_path / "b", records))
    assert [one.style for one in panel(runs[:1], "Time by part").series] == [0, 1, 2, 12]
    assert panel(runs, "Time by part: ²").series[0].values.tolist() == [1.0, 1.0]


def test_a_setting_with_thousands_of_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a traceback for an integer that Python reads, in hexadecimal digits, but does not write."""
    number = "0x" + "f" * 5000
    folder = write_run(
        tmp_path / "run", [step(1, 5.0)], config=f"a: {number}\nb: [{number}]\ntraining: {{steps: {number}}}\n"
    )
    assert run_command([str(folder)], capsys)[0] == 0
    assert (folder / "report.html").read_text(encoding="utf-8").count("a number with thousands of digits") == 3
