"""The comparison of modes: its report, its notes, and the plots of reports and metrics."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from recycle_ds.inference import Decoder, DecodingError
from recycle_ds.inference.bench.comparison import BenchSettings, read_prompts, run_bench, write_report
from recycle_ds.inference.bench.diagnosis import notes_on_verified
from recycle_ds.inference.bench.plots import plot_decoding
from recycle_ds.inference.bench.tables import results_table
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.reporting.plots import plot_loss
from tests.unit.inference.models import random_model

PROMPTS = [[1, 2, 3], [4, 4], [0]]


def test_the_report_has_the_structure_of_decoding_json(tmp_path: Path) -> None:
    """Prevents a report that the demo, the plots or a later comparison cannot read."""
    decoder = Decoder(random_model(6, 1))
    settings = BenchSettings(("verified", "alternate", "verified"), max_new_tokens=12, draft_tokens=2, repeats=2)
    done: list[tuple[int, int]] = []
    result = run_bench(
        decoder, PROMPTS, settings, model="m", dtype="fp32", on_progress=lambda *counts: done.append(counts)
    )
    report = result.report
    assert list(report) == ["modes", "model", "dtype", "threads", "machine"]
    assert list(report["modes"]) == ["autoregressive", "verified", "alternate"]
    for figures in report["modes"].values():
        assert set(figures) == {
            "tokens_per_second", "speedup", "tokens_per_full_call", "acceptance", "identical_to_autoregressive",
            "prompts", "new_tokens",
        }  # fmt: skip
        assert (figures["prompts"], figures["new_tokens"]) == (3, 36)
    modes = report["modes"]
    assert modes["autoregressive"]["speedup"] == modes["autoregressive"]["tokens_per_full_call"] == 1.0
    assert modes["verified"]["identical_to_autoregressive"] is True
    assert 1 < modes["alternate"]["tokens_per_full_call"] <= 3
    assert modes["verified"]["acceptance"] and not modes["alternate"]["acceptance"]
    assert done[-1] == (18, 18)
    write_report(report, tmp_path / "new" / "decoding.json")
    assert json.loads((tmp_path / "new" / "decoding.json").read_text(encoding="utf-8")) == report
    console = Console(width=160, file=StringIO())
    console.print(results_table(report))
    assert all(mode in console.file.getvalue() for mode in modes)  # type: ignore[attr-defined]


def _notes(figures: dict[str, Any], found: list[tuple[int, ...]]) -> list[str]:
    return notes_on_verified(Decoder(random_model(6, 1)), PROMPTS[:1], 3, [(1, 2, 3)], [found], figures)


def test_a_slower_verified_is_explained_in_numbers() -> None:
    """Prevents a table that shows a slowdown without its reason."""
    notes = _notes({"speedup": 0.8, "tokens_per_full_call": 1.25}, [(1, 2, 3)])
    assert len(notes) == 1
    for words in ("not faster", "3 drafts", "call over 4 tokens", "making the drafts", "produced 1.25 tokens"):
        assert words in notes[0]


def test_a_divergence_is_reported_with_its_gap() -> None:
    """Prevents a divergence, for example from rounding, from being reported only as `no`."""
    notes = _notes({"speedup": 1.5, "tokens_per_full_call": 2.0}, [(1, 4, 3)])
    assert len(notes) == 1
    assert "prompt 1 at new token 2" in notes[0]
    assert "logits differ by" in notes[0]
    assert _notes({"speedup": 1.5, "tokens_per_full_call": 2.0}, [(1, 2, 3)]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modes": ("autoregressive", "alternat")}, "did you mean alternate?"),
        ({"max_new_tokens": 1}, "at least 2"),
        ({"repeats": 0}, "repeats=0"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(changes: dict[str, Any], words: str) -> None:
    """Prevents reporting a typing error only after the model was loaded and half of the runs were timed."""
    with pytest.raises(DecodingError) as caught:
        BenchSettings(**changes)
    assert words in str(caught.value)


def test_nothing_to_time_is_an_error() -> None:
    """Prevents a division by zero if every prompt ends with its first token."""
    model = random_model(6, 1)
    ends = {token for prompt in PROMPTS for token in Decoder(model).generate(prompt, max_new_tokens=1).token_ids}
    with pytest.raises(DecodingError, match="nothing to time"):
        run_bench(Decoder(model, ends), PROMPTS, BenchSettings(repeats=1), model="m", dtype="fp32")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', ":2: not valid JSON"),
        ('\n{"text": "a"}\n', ':2: expected an object with a text under "prompt"'),
        ('["a"]', ":1: expected"),
        ('{"prompt": ""}', ":1: the prompt is empty"),
        ("\n", "no prompts"),
        (None, "cannot be read"),
    ],
)
def test_files_of_prompts_are_checked(tmp_path: Path, content: str | None, words: str) -> None:
    """Prevents a stack trace, or a prompt silently skipped, for an invalid file."""
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DecodingError) as caught:
        read_prompts(path)
    assert words in str(caught.value)


def test_blank_lines_between_prompts_are_allowed(tmp_path: Path) -> None:
    """Prevents an error for a file that ends in an empty line."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": " c"}\n\n', encoding="utf-8")
    assert read_prompts(path) == ["a\nb", " c"]


def _mode(speed: float, speedup: float, acceptance: list[float], identical: bool) -> dict[str, Any]:
    return {
        "tokens_per_second": speed,
        "speedup": speedup,
        "tokens_per_full_call": 2.0,
        "acceptance": acceptance,
        "identical_to_autoregressive": identical,
        "prompts": 3,
        "new_tokens": 30,
    }


@pytest.mark.parametrize("acceptance", [[0.82, 0.74, 0.66, 0.6], [0.5], []])
def test_the_decoding_plot_is_drawn(tmp_path: Path, acceptance: list[float]) -> None:
    """Prevents a plot that fails for a report without drafts, or leaves a half-written file."""
    report = {
        "modes": {
            "autoregressive": _mode(71.0, 1.0, [], True),
            "alternate": _mode(131.0, 1.85, [], False),
            "verified": _mode(152.0, 2.14, acceptance, True),
        },
        "model": "runs/example",
        "dtype": "fp32",
        "threads": 2,
        "machine": "a processor",
    }
    plot_decoding(report, tmp_path / "deep" / "decoding.png")
    assert imread(tmp_path / "deep" / "decoding.png").shape[1] > 1500
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["decoding.png"]


def _metrics(depth: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(10, 310, 10):
        loss = 7 * step**-0.2
        recycle = [loss + 0.3 * k for k in range(1, depth + 1)]
        lines.append(
            {"step": step, "loss": loss, "backbone_loss": loss, "recycle_loss": recycle, "tokens": step * 4096}
        )
        if step % 100 == 0:
            evaluation = {"eval_loss": loss + 0.1, "eval_recycle_loss": recycle}
            lines.append(
                {"step": step, **evaluation, "eval_acceptance": [0.2 + step / 900 - 0.1 * k for k in range(depth)]}
            )
    return lines


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_loss_plot_is_drawn_from_metrics(tmp_path: Path, depth: int) -> None:
    """Prevents a plot that fails for a run without a module, with a resume in it, or killed while writing a line."""
    lines = [json.dumps(line) for line in _metrics(depth)]
    lines.insert(5, '{"event": "resume", "step": 40, "checkpoint": "x"}')
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 310, "lo', encoding="utf-8")
    plot_loss(path, tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[1] > 1500


def test_a_loss_that_is_not_a_number_is_left_out_of_the_plot(tmp_path: Path) -> None:
    """Prevents one step without a finite loss from making the run impossible to plot."""
    lines = _metrics(1)
    lines[3]["backbone_loss"] = float("nan")
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    plot_loss(path, tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[1] > 1500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no step has been logged"),
        ('{"step"\n{"step": 1, "backbone_loss": 2}', ":1: not valid JSON"),
        (None, "cannot be"),
    ],
)
def test_metrics_that_cannot_be_plotted_are_an_error(tmp_path: Path, content: str | None, words: str) -> None:
    """Prevents an empty plot for an empty or damaged file."""
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(TrainingError, match=words):
        plot_loss(path, tmp_path / "loss.png")
