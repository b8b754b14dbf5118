"""The record of a run over its restarts, including those after a kill, which could not write their end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.parallel.job import Job
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.faults.stragglers import slowest
from recycle_ds.training.reporting import sessions
from recycle_ds.training.reporting.runs_table import read_summary, summarise_runs
from recycle_ds.training.reporting.sessions import SessionLog


def write_metrics(run_dir: Path, steps: dict[int, float]) -> None:
    records = ({"step": n, "loss": 3.0 / n, "backbone_loss": 2.0 / n, "time": at} for n, at in steps.items())
    lines = [json.dumps(record) + "\n" for record in records]
    (run_dir / "metrics.jsonl").write_text("".join(lines))


def at(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    monkeypatch.setattr(sessions.time, "time", lambda: now)


def log_of(run_dir: Path, **job: Any) -> SessionLog:
    return SessionLog(run_dir, Job(**job), tokens_per_step=100, target=20)


def test_a_killed_session_is_reconstructed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a summary without the repeated steps and the lost time of a session that was killed."""
    at(monkeypatch, 1000.0)
    first = log_of(tmp_path, name="7")
    first.begin(0)
    for step in range(1, 9):
        first.stepped(step, 1.0)
    first.saved(0.5)
    first.event("straggler")
    write_metrics(tmp_path, {step: 1000.0 + step for step in range(1, 9)})
    # killed at step 8; the checkpoint is that of step 5; the next start runs step 6 from second 1099 to 1100
    at(monkeypatch, 1090.0)
    second = log_of(tmp_path, name="7", restarts=1)
    second.begin(5)
    at(monkeypatch, 1100.0)
    second.stepped(6, 1.0)
    text = second.end("finished", 20)
    tree = json.loads((tmp_path / "summary.json").read_text())
    assert [one["ended"] for one in tree["sessions"]] == ["killed", "finished"]
    assert (tree["restarts"], tree["killed"], tree["steps_repeated"], tree["steps_run"]) == (1, 1, 3, 8 + 15)
    lost = (1008 - 1005) + (1100 - 1 - 1090)
    assert tree["lost_seconds"] == pytest.approx(lost), (
        "steps 6 to 8 of the first session, and the start-up of the second"
    )
    assert tree["idle_seconds"] == pytest.approx(1090 - 1008), "nothing ran between the two"
    assert (tree["checkpoints"], tree["saving_seconds"], tree["anomalies"]) == (1, 0.5, {"straggler": 1})
    assert tree["tokens"] == 2000 and "finished at step 20 of 20" in text and "straggler 1" in text


def test_a_new_run_has_lost_nothing(tmp_path: Path) -> None:
    """Prevents the start-up of a run without restarts from counting as time lost to restarts."""
    log = log_of(tmp_path)
    log.begin(0)
    log.stepped(1, 0.1)
    log.end("SIGTERM", 1)
    tree = json.loads((tmp_path / "summary.json").read_text())
    assert (tree["restarts"], tree["lost_seconds"], tree["state"]) == (0, 0.0, "SIGTERM")


def test_hours_in_the_queue_are_not_lost_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a night in the queue from being reported as a night of lost work."""
    at(monkeypatch, 1000.0)
    first = log_of(tmp_path)
    first.begin(0)
    first.stepped(1, 1.0)
    write_metrics(tmp_path, {1: 1001.0})
    at(monkeypatch, 1002.0)
    first.end("time limit", 1)
    at(monkeypatch, 50_000.0)
    second = log_of(tmp_path)
    second.begin(1)
    at(monkeypatch, 50_010.0)
    second.stepped(2, 2.0)
    text = second.end("finished", 2)
    tree = json.loads((tmp_path / "summary.json").read_text())
    assert tree["lost_seconds"] == pytest.approx((1002 - 1001) + (50_010 - 2 - 50_000))
    assert tree["idle_seconds"] == pytest.approx(50_000 - 1002)
    assert text is not None and "restarts 1 (0 after a kill), 9 s of repeated work and start-up, 48998 s idle" in text


def test_a_refused_start_is_not_a_restart(tmp_path: Path) -> None:
    """Prevents a start that was refused, or that ran no step, from counting as a restart or as the end of the run."""
    log = log_of(tmp_path)
    log.begin(0)
    assert log.end("model.layers was 2 and is 3", 0, refused=True) is None
    assert not (tmp_path / "summary.json").exists()
    log = log_of(tmp_path)
    log.begin(0)
    log.stepped(1, 0.1)
    log.end("finished", 1, refused=True)
    before = (tmp_path / "summary.json").read_text()
    assert json.loads(before)["state"] == "finished", "it ran a step, so it is a session although it was refused"
    again = log_of(tmp_path)
    again.begin(1)
    assert again.end("finished", 1, refused=True) is None
    assert (tmp_path / "summary.json").read_text() == before
    bad = log_of(tmp_path)
    bad.begin(1)
    bad.event("nonfinite")
    text = bad.end("step 2: loss nan: not finite; no weight was changed", 1, refused=True)
    assert text is not None, "a bad step occurred, so the start is not a refused one"
    head, *_, error = text.splitlines()
    assert head == f"summary of {tmp_path}: failed at step 1 of 20" and error.startswith("  error: step 2: loss nan")


def test_a_run_killed_after_its_last_step_is_finished_by_the_next_start(tmp_path: Path) -> None:
    """Prevents a finished run from being reported as killed forever because its next start has nothing to do."""
    first = log_of(tmp_path)
    first.begin(0)
    first.stepped(20, 1.0)
    write_metrics(tmp_path, {20: 1.0})
    again = log_of(tmp_path)
    again.begin(20)
    assert again.end("finished", 20, refused=True) is None
    tree = json.loads((tmp_path / "summary.json").read_text())
    assert (tree["state"], tree["restarts"], tree["step"]) == ("finished", 0, 20)


def test_a_kill_between_two_logged_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents hours of false idle time if the end of a session is the last step that the previous session logged."""
    at(monkeypatch, 1000.0)
    first = log_of(tmp_path)
    first.begin(0)
    first.stepped(10, 1.0)
    write_metrics(tmp_path, {10: 1100.0})
    first.end("time limit", 10)
    at(monkeypatch, 5000.0)
    second = log_of(tmp_path)
    second.begin(10, started=4990.0)
    second.stepped(11, 1.0)  # not logged, and then killed
    at(monkeypatch, 5100.0)
    third = log_of(tmp_path)
    third.begin(10, started=5090.0)
    third.stepped(11, 1.0)
    third.end("finished", 11)
    sessions_of = json.loads((tmp_path / "summary.json").read_text())["sessions"]
    assert [one["ended"] for one in sessions_of] == ["time limit", "killed", "finished"]
    assert sessions_of[1]["until"] == 4990.0 and sessions_of[2]["idle_seconds"] == 5090.0 - 4990.0
    assert sessions_of[2]["lost_seconds"] == pytest.approx(5100 - 1 - 5090), (
        "its own start-up, without the hours in the queue"
    )


def test_a_summary_of_the_first_release_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a traceback for a run that was trained with an earlier release."""
    log = log_of(tmp_path)
    log.begin(0)
    log.stepped(1, 0.1)
    log.end("finished", 1)
    tree = json.loads((tmp_path / "summary.json").read_text())
    tree["steps_made"] = tree.pop("steps_run")
    del tree["idle_seconds"]
    (tmp_path / "summary.json").write_text(json.dumps(tree | {"restarts": 1}))
    assert summarise_runs([str(tmp_path)], as_json=False)
    assert "1 steps run, 0 repeated" in capsys.readouterr().out


def test_a_damaged_summary_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a run from failing to start because its summary is truncated."""
    (tmp_path / "summary.json").write_text('{"sess')
    log_of(tmp_path).begin(0)
    assert "starting a new summary" in capsys.readouterr().out


def test_bad_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a sweep with a failed run from being reported as finished, and an omitted run that never started."""
    good, bad, absent = tmp_path / "good", tmp_path / "bad", tmp_path / "absent"
    for folder in (good, bad, absent):
        folder.mkdir()
    for folder, why in ((good, "finished"), (bad, "step 3: loss nan: not finite")):
        log = log_of(folder)
        log.begin(0)
        log.end(why, 3)
        write_metrics(folder, {3: 1.0})
    (absent / "error.txt").write_text("training.stps=3: unknown key\n")
    assert not summarise_runs([str(good), str(bad), str(absent)], as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not finished")]
    assert lines == [
        f"not finished: {bad}: step 3: loss nan: not finite",
        f"not finished: {absent}: training.stps=3: unknown key",
    ]
    assert summarise_runs([str(good)], as_json=False)
    assert (read_summary(good)["loss"], read_summary(good)["backbone_loss"]) == (1.0, 2.0 / 3)
    with pytest.raises(TrainingError, match="no such folder"):
        read_summary(tmp_path / "nowhere")


def test_the_slowest_rank() -> None:
    """Prevents a slow rank from raising the median that it is compared with, and a single rank from being slow."""
    assert slowest([1.0, 1.0, 3.0, 1.0]) == (2, 3.0, 3.0)
    assert slowest([1.0, 4.0]) == (1, 4.0, 4.0)
    assert slowest([2.0]) == (0, 2.0, 1.0)


def test_a_stage_with_more_work_is_not_a_slow_rank() -> None:
    """Prevents the last stage of every pipeline, which has the head and the module, from being reported as slow."""
    assert slowest([1.0, 1.0, 5.0, 5.0], stages=2)[2] == 1.0
    assert slowest([1.0, 2.0, 5.0, 5.0], stages=2) == (1, 2.0, 2.0)
    assert slowest([1.0, 5.0], stages=2) == (1, 5.0, 1.0)
