"""The report of runs: its curves, marks, tables and comparisons are those of the files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.training.reporting.run_report.drawing import draw
from recycle_ds.training.reporting.run_report.page import render
from recycle_ds.training.reporting.sessions import Session
from tests.unit.training.report_reading import page_data, panel, read, titles, values
from tests.unit.training.written_runs import STARTED, evaluation, step, write_run


def test_the_figures_of_the_report_are_those_of_the_files(tmp_path: Path) -> None:
    """Prevents curves that are mixed up: a total for the backbone's loss, one depth for another, training for validation."""
    records: list[dict[str, Any]] = [step(number, 10 / number) for number in range(1, 41)]
    records.insert(20, evaluation(20, 3.0))
    records.append(evaluation(40, 2.0))
    runs = read(write_run(tmp_path / "run", records))
    page = render(runs)
    logged = [10 / number for number in range(1, 41)]
    expected = {
        "Loss": [logged, [loss + 0.5 for loss in logged], [loss + 1 for loss in logged]],
        "Validation loss": [[3.0, 2.0], [3.25, 2.25], [3.75, 2.75]],
        "Acceptance": [[0.5, 0.5], [0.125, 0.125]],
        "Tokens per full call": [[1.5625, 1.5625]],
        "Total loss": [[2 * loss + 1 for loss in logged]],
        "Learning rate": [[1e-3 / number for number in range(1, 41)]],
        "Gradient norm": [[1 + loss / 10 for loss in logged]],
        "Tokens per second": [[2000.0 + number for number in range(1, 41)]],
        "MFU": [[0.25 + number / 10_000 for number in range(1, 41)]],
        "Memory": [[1.5] * 40],
        "Own work of the ranks": [[0.2] * 40, [0.3] * 40],
    }
    data = dict(zip(titles(page), page_data(page), strict=True))
    assert list(data) == list(expected)
    for title, curves in expected.items():
        assert len(data[title]["series"]) == len(curves), title
        for series, curve in zip(data[title]["series"], curves, strict=True):
            assert series["values"] == pytest.approx(curve, rel=1e-5), title
            assert series["steps"] == ([20, 40] if len(curve) == 2 else list(range(1, 41)))
    text = re.sub(r"<[^>]*>", " ", page)
    for fact in (
        "40 of 100",
        "2,560",
        "0.2500",
        "0.7500 1.2500",
        "2.0000 at step 40",
        "50.0 % 12.5 %",
        "1.56",
        "2,020",
        "10.0 s",
    ):
        assert fact in re.sub(r"\s+", " ", text), fact
    assert "2,000,448" in text and "1,000,224" in text and "bf16" in text
    assert "Not recorded: Confidence loss, Gradient norm by part, Time by part." in page


@pytest.mark.parametrize("title", ["Loss", "Gradient norm"])
def test_the_drawn_curve_is_the_data(tmp_path: Path, title: str) -> None:
    """Prevents plots whose axes do not belong to their curves, linear or logarithmic."""
    losses = [1000.0 if number == 17 else 5 + math.sin(number) for number in range(1, 61)]
    records = [step(number, loss, grad_norm=loss) for number, loss in enumerate(losses, start=1)]
    found = panel(read(write_run(tmp_path / "run", records)), title)
    assert found.logarithmic == (title == "Gradient norm")
    drawing = draw(found, 1)
    points = [
        [float(number) for number in pair]
        for pair in re.findall(
            r"[ML] ([\d.-]+) ([\d.-]+)", re.findall(r'class="curve"> <path d="([^"]*)"', drawing.svg)[0]
        )
    ]
    width, height = (float(size) for size in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing.svg)[0])
    low, high = (math.log10(limit) if found.logarithmic else limit for limit in drawing.y_limits)
    assert len(points) == 60
    for (x, y), number, loss in zip(points, range(1, 61), losses, strict=True):
        share = (x / width - drawing.left) / (drawing.right - drawing.left)
        assert found.limits[0] + share * (found.limits[1] - found.limits[0]) == pytest.approx(number, abs=0.02)
        rise = ((height - y) / height - drawing.bottom) / (drawing.top - drawing.bottom)
        value = low + rise * (high - low)
        assert value == pytest.approx(math.log10(loss) if found.logarithmic else loss, abs=1e-4 * (high - low))


@pytest.mark.parametrize(
    ("config", "comparable"),
    [
        ("recycle: {depth: 2}", True),
        ("recycle: {objective: cross_entropy, draft_vocabulary: null}", True),
        ("recycle: {objective: kl}", False),
        ("recycle: {draft_vocabulary: 8192, draft_vocabulary_in_training: false}", True),
        ("recycle: {draft_vocabulary: 8192, draft_vocabulary_in_training: true}", False),
        ("recycle: 3", False),
        ("{}", False),
    ],
)
def test_validation_is_drawn_into_the_same_plot_if_it_is_the_same_quantity(
    tmp_path: Path, config: str, comparable: bool
) -> None:
    """Prevents validation dots far from the curve because the module's objective is not the cross entropy of evaluations."""
    records = [step(1, 5.0), step(2, 4.0), evaluation(2, 3.0)]
    runs = read(write_run(tmp_path / "run", records, config=config), write_run(tmp_path / "other", records[:2]))
    backbone, depth = panel(runs, "Loss: backbone"), panel(runs, "Loss: recycle, depth 1")
    assert backbone.series[0].dots is not None and backbone.series[0].dots[1].tolist() == [3.0]
    assert backbone.series[1].dots is None and backbone.note == "nats per token; dots: validation"
    assert (depth.series[0].dots is not None, depth.note.endswith("validation")) == (comparable, comparable)


def test_resumes_and_anomalies_are_marked(tmp_path: Path) -> None:
    """Prevents a report that hides where a run was resumed, set back or had bad steps."""
    records = [
        *(step(number, 5.0) for number in range(1, 21)),
        {"event": "resume", "step": 20, "checkpoint": "runs/x/checkpoints/step-00000020"},
        *(step(number, 4.0) for number in range(21, 51)),
        {"event": "nonfinite", "step": 50, "time": STARTED, "action": "skip", "score": None},
        {"event": "nonfinite", "step": 50, "time": STARTED, "action": "skip", "score": None},
        *(step(number, 3.0) for number in range(51, 81)),
        {"event": "rollback", "step": 60, "time": STARTED, "from_step": 81, "samples": 64, "reason": "loss_spike"},
        *(step(number, 2.0) for number in range(61, 91)),
        {"event": "resume", "step": 90, "checkpoint": "runs/x/checkpoints/step-00000090"},
    ]
    sessions = [
        Session(
            STARTED, 0, 40, "killed", STARTED + 100, checkpoints=1, saving_seconds=4.0, anomalies={"loss_spike": 1}
        ),
        Session(
            STARTED + 150,
            20,
            90,
            "SIGUSR1",
            STARTED + 200,
            "77",
            1,
            20,
            30.0,
            50.0,
            2,
            6.0,
            {"nonfinite": 2, "rollback": 1},
        ),
    ]
    runs = read(write_run(tmp_path / "run", records, sessions=sessions))
    loss = panel(runs, "Loss")
    assert values(loss, "backbone") == [5.0] * 20 + [4.0] * 30 + [3.0] * 10 + [2.0] * 30, (
        "the later of two lines counts"
    )
    marks = [(mark.step, mark.resume, mark.names) for mark in loss.marks]
    # a resume after which no step was run is only in the table
    assert marks == [(20, True, "resume"), (50, False, "nonfinite (2 times)"), (60, False, "rollback")]
    drawing = draw(loss, 1)
    assert (drawing.svg.count("mark-resume"), drawing.svg.count("mark-anomaly")) == (1, 2)
    page = render(runs)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert ["60", "2026-09-21 14:13:20", "rollback", "from_step: 81, samples: 64, reason: loss_spike"] in rows
    assert ["2026-09-21 14:15:50", "20 to 90", "SIGUSR1", "77", "2", "6.0 s", "30.0 s", "50.0 s"] in rows
    assert sum(row[2:3] == ["resume"] for row in rows) == 2
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "1 (1 after a kill)" in text and "loss_spike 1, nonfinite 2, rollback 1" in text
    for part in (
        "start-up 110.0 s, 55.0 %",
        "checkpoints 10.0 s, 5.0 %",
        "restarts 30.0 s, 15.0 %",
        "starts 50.0 s, 25.0 %",
    ):
        assert part in text, part


def test_several_runs_share_plots_and_show_what_differs(tmp_path: Path) -> None:
    """Prevents a comparison that mixes up runs, hides a difference in settings or layout, or marks equal ones."""
    short = [step(number, 5.0) for number in range(1, 11)]
    long = [*(step(number, 4.0) for number in range(1, 21)), evaluation(20, 3.0), {"event": "loss_spike", "step": 7}]
    write_run(
        tmp_path / "a" / "run", short, config="training: {learning_rate: 0.001, seed: 1}\nrecycle: {taps: [0, 1]}\n"
    )
    write_run(tmp_path / "b" / "run", long, config="training: {learning_rate: 0.002, seed: 1}\ninit_from: null\n")
    runs = read(tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert [run.label for run in runs] == ["a/run", "b/run"]
    backbone, depth = panel(runs, "Loss: backbone"), panel(runs, "Loss: recycle, depth 2")
    assert {one.label: (one.style, set(one.values.tolist())) for one in backbone.series} == {
        "a/run": (0, {5.0}),
        "b/run": (1, {4.0}),
    }
    assert [set(one.values.tolist()) for one in depth.series] == [{6.0}, {5.0}]
    assert backbone.limits == depth.limits == (0, 20)
    assert [(mark.step, mark.style) for mark in backbone.marks] == [(7, 1)]
    assert [one.label for one in panel(runs, "Acceptance: draft 1").series] == ["b/run"]
    page = render(runs)
    assert "2 of 4 settings differ" in page
    differ = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r'<tr class="differs">(.*?)</tr>', page)]
    assert [row.strip("|").split("||") for row in differ] == [
        ["training.learning_rate", "0.001", "0.002"], ["recycle.taps", "[0, 1]", "–"],
    ]  # fmt: skip
    assert page.count("1 of 1 ") == 0 and page.count('class="wide"') >= 5


def test_layouts_that_differ_are_highlighted(tmp_path: Path) -> None:
    """Prevents a comparison of runs at different layouts that does not say so."""
    for name in ("a", "b", "c"):
        write_run(tmp_path / name, [step(1, 5.0)])
    layout = json.loads((tmp_path / "b" / "run.json").read_text()) | {"dtype": "fp32"}
    (tmp_path / "b" / "run.json").write_text(json.dumps(layout))
    (tmp_path / "c" / "run.json").unlink()
    page = render(read(tmp_path / "a", tmp_path / "b", tmp_path / "c"))
    differ = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r'<tr class="differs">(.*?)</tr>', page)]
    assert [row.strip("|").split("||") for row in differ] == [["dtype", "bf16", "fp32", "–"]]


def test_checkpoints_and_versions_are_those_on_disk(tmp_path: Path) -> None:
    """Prevents a report without the versions that a run was made with, or one that fails on a damaged manifest."""
    folder = write_run(tmp_path / "run", [step(1, 5.0)])
    for number in (20, 100):
        checkpoint = folder / "checkpoints" / f"step-{number:08d}"
        checkpoint.mkdir(parents=True)
        provenance = {
            "recycle_ds": f"0.{number}",
            "packages": {"torch": "2.13.0"},
            "git": "abc",
            "command": ["pretrain", "--x"],
        }
        (checkpoint / "manifest.json").write_text(json.dumps({"provenance": provenance}))
    (folder / "checkpoints" / ".tmp-step-00000200").mkdir()
    text = re.sub(r"<[^>]*>", " ", render(read(folder)))
    for fact in ("20, 100", "0.100", "2.13.0", "abc", "pretrain --x"):
        assert fact in text, fact
    (checkpoint / "manifest.json").write_text("{")
    (run,) = read(folder)
    assert run.checkpoints.steps == (100, 20)
    assert [note.partition(":")[0] for note in run.notes] == ["versions are unknown"]
