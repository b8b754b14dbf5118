"""Keeps the summary of a run up to date, and tells the shell of a batch job which step is saved."""

from __future__ import annotations

from recycle_ds.config import RecycleError
from recycle_ds.parallel.job import Job
from recycle_ds.parallel.peers import TakenOver
from recycle_ds.training.faults.stop_requests import REASONS
from recycle_ds.training.observers import Event, Observer, RunEnd, SaveEnd, StepEnd
from recycle_ds.training.reporting.sessions import SessionLog


class Summary(Observer):
    """Writes run_dir/summary.json, and prints it at the end."""

    on_error = "raise"

    def __init__(self, sessions: SessionLog, job: Job) -> None:
        self._sessions, self._job = sessions, job

    def after_step(self, end: StepEnd) -> None:
        """Records that a step was run, and how long it took."""
        self._sessions.stepped(end.completed, end.seconds)

    def at_save(self, save: SaveEnd) -> None:
        """Records that a checkpoint was published, and how long training was blocked by it."""
        if save.folder is not None:
            self._job.write_note("progress", str(save.step))
            self._sessions.saved(save.waited)

    def at_event(self, event: Event) -> None:
        """Counts an anomaly."""
        self._sessions.event(event.name)

    def at_end(self, end: RunEnd) -> None:
        """Closes the session and prints the summary of the run so far."""
        if isinstance(end.error, TakenOver):  # the files belong to the later start
            return
        # unless a step was run: then it is no refusal
        refused = end.reason not in REASONS if end.error is None else isinstance(end.error, RecycleError)
        text = self._sessions.end(end.reason, end.step, refused=refused)
        if text is not None:
            print(text, flush=True)
