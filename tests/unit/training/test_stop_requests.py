"""Requests to stop, and the priority of their reasons."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, REASONS, STOP_FILE, TAKEN_OVER, TIME_LIMIT, StopRequest
from recycle_ds.training.observers import EvaluationEnd, SaveEnd, StepEnd


def test_every_reason_is_noticed(tmp_path: Path) -> None:
    """Prevents a stop file, the job's end or a signal from being missed, and a time limit that stops too early."""
    files = {tmp_path / "shell": JOB_SIGNAL, tmp_path / "stop": STOP_FILE}
    with StopRequest(files, time.time() + 100) as stop:
        assert stop.poll(50) is None
        assert stop.poll(101) == TIME_LIMIT
    for names, reason in ((["shell"], JOB_SIGNAL), (["stop"], STOP_FILE), (["shell", "stop"], STOP_FILE)):
        with StopRequest(files) as stop:
            for name in names:
                (tmp_path / name).touch()
            assert stop.poll(0) == reason, "the user's request has priority"
            stop.remove_stop_files()
            assert not list(tmp_path.iterdir())
    with StopRequest(files) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll(0) == "SIGTERM"
        (tmp_path / "stop").touch()
        assert stop.poll(0) == STOP_FILE, "the user's request has priority over an earlier signal"
        stop.remove_stop_files()
    with StopRequest({tmp_path / "no folder" / "stop": STOP_FILE, tmp_path: JOB_SIGNAL}) as stop:
        stop.remove_stop_files()  # a file that cannot be removed must not crash the run
    with StopRequest() as stop:
        for name in ("SIGUSR1", "SIGTERM", "SIGTERM"):
            os.kill(os.getpid(), signal.Signals[name])
        assert stop.poll(0) == "SIGUSR1", "the first signal has priority"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_taken_over_has_priority() -> None:
    """Prevents a run from saving on a signal into a folder that a later start has taken over."""
    holders = [None, "process 1 on elsewhere"]
    with StopRequest(taken_by=lambda: holders[-1]) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.poll(0), stop.taker) == (TAKEN_OVER, holders[-1])
    assert REASONS[-1] == TAKEN_OVER, "among the ranks' reasons, the last one has priority"


def test_a_run_stops_early_enough_before_the_end_of_its_job() -> None:
    """Prevents a job that is killed during its last checkpoint: up to three steps, an evaluation, and two saves, one of them
    under way, come before its end."""
    with StopRequest(end=time.time() + 100) as stop:
        for number, seconds in ((1, 500.0), (2, 8.0), (3, 6.0)):
            stop.after_step(StepEnd(number, number, "apply", number, 2.5, (2.5,), 1.0, {}, 0.1, seconds))
        for seconds in (15.0, 12.0):
            stop.at_save(SaveEnd(3, None, seconds, 0.0))
            stop.after_evaluation(EvaluationEnd(3, {}, seconds - 5))
        assert stop.needed == 3 * 8 + 2 * 15 + 10, "the first step compiles: it does not count"
        assert stop.poll(20 + stop.needed) is None
        assert stop.poll(50 + stop.needed) == TIME_LIMIT
