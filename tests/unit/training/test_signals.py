"""Which of several reasons to stop wins."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, REASONS, STOP_FILE, TAKEN_OVER, TIME_LIMIT, StopRequest


def test_every_reason_is_heard(tmp_path: Path) -> None:
    """A stop file, the job's end or a signal that nobody looks at; one that is heard before it is due."""
    files = {tmp_path / "of the shell": JOB_SIGNAL, tmp_path / "stop": STOP_FILE}
    with StopRequest(files, time.time() + 100) as stop:
        assert stop.poll(50) is None
        assert stop.poll(101) == TIME_LIMIT
    for names, reason in ((["of the shell"], JOB_SIGNAL), (["stop"], STOP_FILE), (["of the shell", "stop"], STOP_FILE)):
        with StopRequest(files) as stop:
            for name in names:
                (tmp_path / name).touch()
            assert stop.poll(0) == reason, "a person's wish counts more"
            stop.obeyed()
            assert not list(tmp_path.iterdir())
    with StopRequest(files) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll(0) == "SIGTERM"
        (tmp_path / "stop").touch()
        assert stop.poll(0) == STOP_FILE, "at any time"
        stop.obeyed()
    with StopRequest({tmp_path / "no folder" / "stop": STOP_FILE, tmp_path: JOB_SIGNAL}) as stop:
        stop.obeyed()  # a file that cannot be removed is no reason to crash
    with StopRequest() as stop:
        for name in ("SIGUSR1", "SIGTERM", "SIGTERM"):
            os.kill(os.getpid(), signal.Signals[name])
        assert stop.poll(0) == "SIGUSR1", "the first one"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_taken_over_beats_all() -> None:
    """A run that saves because of a signal, into a folder that is another start's by now."""
    holders = [None, "process 1 on elsewhere"]
    with StopRequest(taken_by=lambda: holders[-1]) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.poll(0), stop.taker) == (TAKEN_OVER, holders[-1])
    assert REASONS[-1] == TAKEN_OVER, "the last one wins among ranks"
