"""The curves that the page draws, read from a run's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.serving.curves import read_curves


def step(number: int, loss: float, recycle: list[float] | None = None) -> dict[str, Any]:
    return {
        "step": number,
        "loss": 2 * loss,
        "backbone_loss": loss,
        "recycle_loss": recycle or [],
        "tokens": 8 * number,
    }


def evaluation(number: int, loss: float, acceptance: list[float]) -> dict[str, Any]:
    return {"step": number, "eval_loss": loss, "eval_recycle_loss": [loss], "eval_acceptance": acceptance}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, *records: dict[str, Any], end: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end, encoding="utf-8")


def test_curves_of_a_run(log: Path) -> None:
    """Prevents curves that are mixed up: the total for the backbone's, steps for depths, training for validation."""
    write(
        log,
        step(1, 4.0, [5.0, 6.0]),
        step(2, 3.0, [4.0, 5.0]),
        evaluation(2, 3.5, [0.5, 0.25]),
        step(3, 2.0, [3.0, 4.0]),
    )
    assert read_curves(log) == {
        "steps": [1, 2, 3],
        "loss": [8.0, 6.0, 4.0],
        "backbone_loss": [4.0, 3.0, 2.0],
        "recycle_loss": [[5.0, 4.0, 3.0], [6.0, 5.0, 4.0]],
        "eval": {"steps": [2], "loss": [3.5], "acceptance": [[0.5], [0.25]]},
        "resumed": [],
    }


def test_a_model_without_a_module_has_no_recycle_curves(log: Path) -> None:
    """Prevents a page that fails on a run without a recycle module."""
    write(log, step(1, 4.0), evaluation(1, 3.0, []))
    curves = read_curves(log)
    assert (curves["recycle_loss"], curves["eval"]["acceptance"]) == ([], [])


@pytest.mark.parametrize(
    "end", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0, "backbone_loss": 1.0}', "\x00\x00", "7\n", "[1]\n"]
)
def test_an_incomplete_last_line_is_skipped(log: Path, end: str) -> None:
    """Prevents a page that fails, or shows half a number, while a run writes, or after it was killed."""
    write(log, step(1, 4.0), step(2, 3.0), end=end)
    assert read_curves(log)["steps"] == [1, 2]


def test_a_damaged_line_costs_one_point(log: Path) -> None:
    """Prevents one damaged line from hiding the rest of a run."""
    first, last = json.dumps(step(1, 4.0)), json.dumps(step(3, 2.0))
    log.write_bytes(f"{first}\n".encode() + b'\xff\xfe{"step": 2\n' + f"{last}\n".encode())
    assert read_curves(log)["steps"] == [1, 3]


def test_a_resumed_run_reads_like_one_run(log: Path) -> None:
    """Prevents curves that run backwards, or count steps twice, where a run was resumed from an older checkpoint."""
    write(
        log,
        *(step(number, 10.0 - number) for number in range(1, 7)),
        evaluation(6, 9.0, [0.1]),
        {"event": "resume", "step": 4, "checkpoint": "x"},
        *(step(number, 5.0 - number / 10) for number in range(5, 9)),
        evaluation(6, 4.5, [0.6]),
        {"event": "resume", "step": 8, "checkpoint": "y"},
    )
    curves = read_curves(log)
    assert curves["steps"] == list(range(1, 9))
    assert curves["backbone_loss"] == [9.0, 8.0, 7.0, 6.0, 4.5, 4.4, 4.3, 4.2]
    assert curves["eval"] == {"steps": [6], "loss": [4.5], "acceptance": [[0.6]]}
    assert curves["resumed"] == [4], "a resume at the end, after which nothing was run, is none of the curves'"


def test_steps_logged_twice_without_a_resume_line_count_once(log: Path) -> None:
    """Prevents curves that run backwards after a rollback."""
    write(log, step(1, 4.0), step(2, 9.0), step(3, 9.5), step(2, 3.0), step(3, 2.0))
    assert read_curves(log)["backbone_loss"] == [4.0, 3.0, 2.0]


def test_numbers_that_are_not_finite_become_null(log: Path) -> None:
    """Prevents NaN in the JSON, which browsers refuse to read."""
    log.write_text(
        '{"step": 1, "loss": NaN, "backbone_loss": Infinity, "recycle_loss": [NaN]}\n'
        '{"step": 2, "loss": 1.0, "backbone_loss": null, "recycle_loss": [2.0]}\n'
    )
    curves = read_curves(log)
    assert (curves["loss"], curves["backbone_loss"], curves["recycle_loss"]) == (
        [None, 1.0],
        [None, None],
        [[None, 2.0]],
    )
    json.dumps(curves, allow_nan=False)


def test_long_runs_are_thinned_to_means(log: Path) -> None:
    """Prevents megabytes of points for a long run, and curves that drop its last step or single peaks."""
    write(log, *(step(number, float(number % 10)) for number in range(1, 20_001)))
    curves = read_curves(log, max_points=100)
    assert len(curves["steps"]) == 100
    assert curves["steps"][-1] == 20_000
    assert curves["backbone_loss"] == [4.5] * 100


def test_an_empty_log_has_no_points(log: Path) -> None:
    """Prevents a page that fails on a run that has not logged a step yet."""
    write(log)
    curves = read_curves(log)
    assert (curves["steps"], curves["eval"]["steps"]) == ([], [])
