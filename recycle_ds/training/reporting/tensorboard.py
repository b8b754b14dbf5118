"""The metrics of a run in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recycle_ds.parallel.peers import TakenOver
from recycle_ds.training.observers import ROLLBACK, EvaluationEnd, Event, LoggedStep, Observer, RunEnd, RunStart
from recycle_ds.training.reporting.metrics_lines import scalars


class TensorBoard(Observer):
    """Copies the numbers of metrics.jsonl to run_dir/tensorboard/."""

    on_error = "drop"

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "tensorboard"
        self._writer: Any = None

    def at_start(self, start: RunStart) -> None:
        """Opens a new file of events."""
        self._open(start.step)

    def at_log(self, log: LoggedStep) -> None:
        """Adds the numbers of a step."""
        self._add(log.step, log.metrics)

    def after_evaluation(self, end: EvaluationEnd) -> None:
        """Adds the numbers of an evaluation."""
        self._add(end.step, end.metrics)

    def at_event(self, event: Event) -> None:
        """A rollback hides what comes after its step."""
        if event.name == ROLLBACK:
            self._writer.close()
            self._open(event.step)

    def at_end(self, end: RunEnd) -> None:
        """Closes the file, unless the folder belongs to a later start."""
        if not isinstance(end.error, TakenOver):
            self._writer.close()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(self._folder), purge_step=step + 1
        )  # hides what earlier ones wrote after `step`

    def _add(self, step: int, metrics: Mapping[str, Any]) -> None:
        for tag, number in scalars(metrics):
            self._writer.add_scalar(tag, number, step)
