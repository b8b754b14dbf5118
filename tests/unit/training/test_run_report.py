"""The report of runs: what is read from their files, thinning, and the page."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recycle_ds.config import RecycleError
from recycle_ds.report import main, published_checkpoints
from recycle_ds.training.reporting.run_report.drawing import draw
from recycle_ds.training.reporting.run_report.page import render
from recycle_ds.training.reporting.run_report.panels import Panel, panels
from recycle_ds.training.reporting.run_report.runs import Run, read_runs
from recycle_ds.training.reporting.run_report.thinning import smooth, thin
from recycle_ds.training.reporting.sessions import Session
from tests.runs import ROOT
from tests.unit.training.written_runs import STARTED, evaluation, step, write_run


def read(*folders: Path) -> list[Run]:
    return read_runs([str(folder) for folder in folders], published_checkpoints)


def panel(runs: list[Run], title: str) -> Panel:
    (found,) = [one for one in panels(runs) if one.title == title]
    return found


def values(found: Panel, label: str) -> list[float]:
    (series,) = [one for one in found.series if one.label == label]
    return series.values.tolist()


def page_data(page: str) -> list[dict[str, Any]]:
    """The values that the page's script reads, by plot."""
    found: list[dict[str, Any]] = json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0]
    )
    return found


def titles(page: str) -> list[str]:
    return [html.unescape(title) for title in re.findall(r"<figcaption><h3>(.*?)</h3>", page)]


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


def test_thinning_keeps_the_least_and_the_greatest_values() -> None:
    """Prevents a report of a long run without its spike, its best step, its first or its last one."""
    steps = np.arange(1.0, 100_001.0)
    curve = np.sin(steps / 900)
    curve[[31_415, 77_777]] = 40.0, -30.0
    kept_steps, kept = thin(steps, curve)
    assert 400 < len(kept) <= 500 and np.all(np.diff(kept_steps) > 0)
    assert (kept_steps[0], kept_steps[-1]) == (1, 100_000)
    assert {31_416.0: 40.0, 77_778.0: -30.0}.items() <= dict(
        zip(kept_steps.tolist(), kept.tolist(), strict=True)
    ).items()
    for start in range(0, 100_000, 5000):  # also of every part; a stretch is 402 steps long
        part = curve[start : start + 5000]
        around = kept[(kept_steps > start - 402) & (kept_steps <= start + 5402)]
        assert around.max() >= part.max() and around.min() <= part.min()


def test_a_loss_that_diverged_leaves_its_curve_readable(tmp_path: Path) -> None:
    """Prevents a curve that is flat because its last values are a thousand times the others."""
    losses = [5 - number / 10 for number in range(1, 21)] + [1e3, 1e9, 3e38]
    records = [step(number, loss) for number, loss in enumerate(losses, start=1)]
    runs = read(write_run(tmp_path / "run", records))
    loss = panel(runs, "Loss")
    assert loss.logarithmic and values(loss, "backbone") == losses
    assert draw(loss, 1).y_limits[1] > 3e38 and "3e+38" in render(runs)


def test_thinning_keeps_gaps() -> None:
    """Prevents a line that is drawn through a stretch without finite values, and an extreme that a NaN hides."""
    curve = np.ones(10_000)
    curve[2000:4000] = np.nan
    curve[7000], curve[7001] = np.nan, 5.0
    steps, kept = thin(np.arange(10_000.0), curve)
    assert np.isnan(kept[(steps >= 2100) & (steps < 3900)]).all() and np.nanmax(kept) == 5.0
    assert not np.isnan(kept[(steps < 1900) | (steps > 4100)]).any()


def test_the_running_mean_is_centred_and_skips_what_is_not_finite() -> None:
    """Prevents a mean that lags behind its curve, or that one NaN ends."""
    curve = np.arange(1000.0)
    curve[500] = np.nan
    smoothed = smooth(np.arange(1000.0), curve)
    assert smoothed is not None
    inner = (smoothed[0] > 20) & (smoothed[0] < 980)
    assert np.abs(smoothed[1] - smoothed[0])[inner].max() < 0.6 and np.isfinite(smoothed[1]).all()
    assert smooth(np.arange(50.0), np.arange(50.0)) is None


def test_a_long_run_gives_a_file_of_bounded_size(tmp_path: Path) -> None:
    """Prevents reports that grow with the run, and thinning or running means that the page does not mention."""
    sizes = []
    for length in (2000, 10_000):
        records: list[dict[str, Any]] = []
        for number in range(1, length + 1):
            records.append(step(number, 3 + math.sin(number * number), grad_norm=900.0 if number == 1111 else 1.0))
            if number % 3 == 0:
                records.append(
                    {"event": "straggler", "step": number, "time": STARTED, "rank": 1, "host": "n", "ratio": 2.0}
                )
        runs = read(write_run(tmp_path / str(length), records))
        page = render(runs)
        sizes.append(len(page))
        assert "reduced to 500 points" in page and "running mean over 3 %" in page
        assert max(values(panel(runs, "Gradient norm"), "gradient norm")) == 900.0
        assert page.count("mark-anomaly") <= 151 * len(titles(page)), "marks at one place are drawn once"
        assert f"{length // 3 - 200:,} left out" in page
    assert sizes[1] < 1.1 * sizes[0] < 1_000_000


def test_a_short_run_is_complete() -> None:
    """Prevents a short run from being thinned."""
    steps, curve = np.arange(1.0, 501.0), np.arange(500.0)
    assert all(np.array_equal(*pair) for pair in zip(thin(steps, curve), (steps, curve), strict=True))


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


class References(HTMLParser):
    """Collects what a page refers to, and the elements and attributes that run scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attributes:
            if name in ("href", "src", "srcset", "action", "data", "xlink:href", "poster") and not (
                value or ""
            ).startswith("#"):
                self.found.append(f"{tag} {name}={value}")
            assert not name.startswith("on"), (tag, name)


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    """Prevents a report that loads something from the network, or from files beside it."""
    page = render(read(write_run(tmp_path / "run", [step(1, 5.0), step(2, 4.0), evaluation(2, 3.0)])))
    references = References()
    references.feed(page)
    assert references.found == ["link href=data:,"]
    assert not re.search(r"https?:|@import|//\w|url\((?!#)|\bimport\s", re.sub(r"// [A-Z].*", "", page))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


EVIL = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_text_of_the_files_is_escaped(tmp_path: Path) -> None:
    """Prevents names, messages and settings in a run's files from becoming elements or scripts of the page."""
    records = [
        *(step(number, 5.0, grad_norm_by_part={EVIL: 1.0}) for number in (1, 2, 3)),
        {"event": EVIL, "step": 2, "host": EVIL, EVIL: EVIL},
    ]
    sessions = [Session(STARTED, 0, 3, EVIL, STARTED + 5, EVIL, anomalies={EVIL: 1})]
    folder = write_run(
        tmp_path / EVIL.replace("/", "|"), records, config=json.dumps({EVIL: {EVIL: EVIL}}), sessions=sessions
    )
    (folder / "error.txt").write_text(EVIL)
    layout = json.loads((folder / "run.json").read_text()) | {"dtype": EVIL}
    (folder / "run.json").write_text(json.dumps(layout))
    checkpoint = folder / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    provenance = {"git": EVIL, "packages": {EVIL: EVIL}, "command": [EVIL]}
    (checkpoint / "manifest.json").write_text(json.dumps({"provenance": provenance}))
    other = write_run(tmp_path / "other", [step(1, 4.0)])
    for runs in (read(folder), read(folder, other)):
        references = References()
        page = render(runs)
        references.feed(page)
        assert references.scripts == 2, "the page's own data and script"
        assert "<img" not in page and "alert(1)</script>" not in page
        assert html.escape(EVIL, quote=False)[:40] in page.replace("&#34;", '"').replace("&#39;", "'")
        page_data(page)


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


def run_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


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
