"""metrics.jsonl: flushed lines, and lines that a resume removes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ds.training.observers import LoggedStep, RunEnd, RunStart
from recycle_ds.training.reporting.metrics_log import MetricsLog
from recycle_ds.training.reporting.tensorboard import TensorBoard

END = RunEnd(3, "finished", 3)


def test_lines_are_flushed_and_unrounded(tmp_path: Path) -> None:
    """Prevents lines that are lost by a kill, and rounded figures that hide differences between runs."""
    log = MetricsLog(tmp_path, resumed_step=0)
    log.write({"step": 1, "loss": 0.1 + 0.2})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.1 + 0.2}
    log.at_end(END)


def test_a_resume_removes_later_lines(tmp_path: Path) -> None:
    """Prevents a partial last line from being joined to the next one, and steps that appear twice after a resume."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"event": "resume", "step": 2}\n{"step": 3}\n{"step": 4, "lo')
    log = MetricsLog(tmp_path, resumed_step=2)
    log.write({"step": 3})
    log.at_end(END)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 3]


def test_a_new_run_starts_with_an_empty_log(tmp_path: Path) -> None:
    """Prevents a run that starts over from keeping lines from before a kill without a checkpoint."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsLog(tmp_path, resumed_step=0).at_end(END)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_gets_every_depth(tmp_path: Path) -> None:
    """Prevents recycle losses that are missing in TensorBoard, or that are written under one name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoard(tmp_path)
    log.at_start(RunStart(None, None, 0, 3))  # type: ignore[arg-type]
    log.at_log(LoggedStep(3, {"step": 3, "loss": 2.0, "recycle_loss": [3.0, 4.0], "time": 1.0}))
    log.at_end(END)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "recycle_loss/1", "recycle_loss/2"}
    assert [(event.step, event.value) for event in events.Scalars("recycle_loss/2")] == [(3, 4.0)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a finished run that ends in a traceback because the last lines of its log cannot be written."""
    log = MetricsLog(tmp_path, resumed_step=0)
    log._file.close()
    log._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    log.write({"step": 1})
    log.at_end(END)
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == 2 and all("metrics.jsonl" in line and "No space left" in line for line in warnings)
