"""metrics.jsonl, written by rank 0 during a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.training.observers import ROLLBACK, EvaluationEnd, Event, LoggedStep, Observer, RunEnd


class MetricsLog(Observer):
    """Appends lines to run_dir/metrics.jsonl, each flushed."""

    on_error = "raise"

    def __init__(self, run_dir: Path, *, resumed_step: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        trim(self._path, resumed_step)
        self._file = self._path.open("a", encoding="utf-8")

    def at_log(self, log: LoggedStep) -> None:
        """Writes the line of a step."""
        self.write(log.metrics)

    def after_evaluation(self, end: EvaluationEnd) -> None:
        """Writes the line of an evaluation."""
        self.write(end.metrics)

    def at_event(self, event: Event) -> None:
        """Writes a line; after a rollback everything later is dropped first."""
        if event.name == ROLLBACK:
            self._rewind(event.step)
        self.write({"event": event.name, "step": event.step, "time": time.time(), **event.details})

    def at_end(self, end: RunEnd) -> None:
        """Closes the file."""
        try:
            self._file.close()
        except OSError as error:  # a log must not end the run
            print(f"warning: {self._path}: the last lines could not be written: {error}", flush=True)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one line, floats unrounded. Non-finite numbers are written as NaN and Infinity, which Python reads back."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:  # a log must not end the run
            print(f"warning: {self._path}: a line could not be written: {error}", flush=True)

    def _rewind(self, step: int) -> None:
        """Drops everything after `step`: the run continues from there."""
        try:
            self._file.flush()
            trim(self._path, step)
            self._file.close()
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:  # a log must not end the run
            print(f"warning: {self._path}: lines after step {step} cannot be removed: {error}", flush=True)


def trim(path: Path, step: int) -> None:
    """Drops a partial last line and everything after `step`, so that a resumed run's log reads like that of one run."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and isinstance(record, dict) and record.get("step", 0) <= step:
            kept.append(line)
    write_atomically(path, "".join(kept))
