"""metrics.jsonl: flushed lines, and a log that a resume can trim."""

from __future__ import annotations

import json
from pathlib import Path

from recycle_ds.training.reporting.metrics_log import MetricsLog


def test_lines_are_flushed_and_unrounded(tmp_path: Path) -> None:
    """Lines that a kill loses, or figures rounded so that a comparison of runs shows nothing."""
    log = MetricsLog(tmp_path, tensorboard=False, resumed_step=0)
    log.write({"step": 1, "loss": 0.1 + 0.2})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.1 + 0.2}
    log.close()


def test_resume_trims_what_came_after(tmp_path: Path) -> None:
    """A partial last line joined to the next one, or steps that appear twice after a resume."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"event": "resume", "step": 2}\n{"step": 3}\n{"step": 4, "lo')
    log = MetricsLog(tmp_path, tensorboard=False, resumed_step=2)
    log.write({"step": 3})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 3]


def test_a_new_run_does_not_inherit(tmp_path: Path) -> None:
    """Lines of a run that was killed before its first checkpoint left in the log of the run that begins anew."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsLog(tmp_path, tensorboard=False, resumed_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_gets_every_depth(tmp_path: Path) -> None:
    """Recycle losses that are in the file and not in TensorBoard, or written under one name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, tensorboard=True, resumed_step=0)
    log.write({"step": 3, "loss": 2.0, "recycle_loss": [3.0, 4.0], "time": 1.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "recycle_loss/1", "recycle_loss/2"}
    assert [(event.step, event.value) for event in events.Scalars("recycle_loss/2")] == [(3, 4.0)]
