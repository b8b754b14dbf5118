"""The metrics of a run in Weights & Biases, through its package `wandb`, which is not a dependency."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.training.observers import EvaluationEnd, LoggedStep, Observer, RunEnd, RunStart
from recycle_ds.training.reporting.metrics_lines import scalars

RUN_ID = "wandb_run_id"
"""File in run_dir with the id of the run, so that a resumed run continues it."""


class WeightsAndBiases(Observer):
    """Copies the numbers of metrics.jsonl to a run of `project`, over the run's step; its files are in run_dir/wandb/.

    wandb's own environment variables choose the account, the mode (WANDB_MODE=offline), and so on.
    """

    on_error = "drop"

    def __init__(self, run_dir: Path, project: str) -> None:
        self._run_dir, self._project = run_dir, project
        self._run: Any = None

    def at_start(self, start: RunStart) -> None:
        """Creates the run, or continues it."""
        import wandb

        file = self._run_dir / RUN_ID
        if not file.exists():
            write_atomically(file, f"{secrets.token_hex(4)}\n")
        self._run = wandb.init(
            project=self._project,
            name=self._run_dir.resolve().name,
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(self._run_dir),
            config=start.config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),  # the run's output is not wandb's to redirect
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back, as a rollback does

    def at_log(self, log: LoggedStep) -> None:
        """Sends the numbers of a step."""
        self._log(log.step, log.metrics)

    def after_evaluation(self, end: EvaluationEnd) -> None:
        """Sends the numbers of an evaluation."""
        self._log(end.step, end.metrics)

    def at_end(self, end: RunEnd) -> None:
        """Waits until everything is sent."""
        self._run.finish(exit_code=0 if end.error is None else 1)

    def _log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **dict(scalars(metrics))})
