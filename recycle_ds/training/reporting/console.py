"""The run on the console: a live progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recycle_ds.config.console import output_console
from recycle_ds.training.observers import (
    EvaluationEnd,
    Event,
    LoggedStep,
    Observer,
    RunEnd,
    RunStart,
    SaveEnd,
    StepEnd,
)


class RunConsole(Observer):
    """Prints the run. steps: those of the full schedule."""

    on_error = "raise"

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._progress: Progress | None = None
        self._task: Any = None

    def at_start(self, start: RunStart) -> None:
        """Shows the progress bar."""
        if sys.stdout.isatty():
            columns = (
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=output_console())
            self._task = self._progress.add_task("starting", total=self._steps, completed=start.step)
            self._progress.start()

    def after_step(self, end: StepEnd) -> None:
        """Updates the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=end.completed)

    def at_log(self, log: LoggedStep) -> None:
        """Shows a logged step."""
        text = describe(log.metrics)
        if self._progress is not None:
            self._progress.update(self._task, description=text)
        else:
            self._say(f"step {log.step}/{self._steps}  {text}")

    def after_evaluation(self, end: EvaluationEnd) -> None:
        """Prints the evaluation."""
        self._say(describe_evaluation(end.metrics))

    def at_save(self, save: SaveEnd) -> None:
        """Names the checkpoint. One that could not be written is an event."""
        if save.folder is not None:
            self._say(f"saved {save.folder} in {save.seconds:.1f} s; training waited {save.waited:.2f} s")

    def at_event(self, event: Event) -> None:
        """Prints a warning."""
        self._say(f"warning: {event.text}")

    def at_end(self, end: RunEnd) -> None:
        """Stops the progress bar. An error is printed by the command."""
        if self._progress is not None:
            self._progress.stop()
        if end.error is None:
            key = "training.steps" if end.reason == "finished" else "training.stop_at"
            idle = "" if end.steps else f"; nothing was left to do: raise {key}, or use another run_dir"
            self._say(f"{end.reason} at step {end.step}{idle}")

    def _say(self, text: str) -> None:
        """Prints one line above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


def describe(record: Mapping[str, Any]) -> str:
    """A logged step in one line. `loss` is what is optimised: the weighted sum of the backbone's and the recycle losses."""
    recycle = " ".join(f"{loss:.3f}" for loss in record["recycle_loss"])
    parts = [f"loss {record['loss']:.3f}"]
    if recycle:  # without a module both are the same
        parts += [f"backbone {record['backbone_loss']:.3f}", f"recycle {recycle}"]
    parts += [
        f"grad {record['grad_norm']:.2f}",
        f"lr {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"mfu {100 * record['mfu']:.0f}%",
    ]
    return "  ".join(parts)


def describe_evaluation(record: Mapping[str, Any]) -> str:
    """An evaluation in one line. The loss is the backbone's."""
    text = f"validation at step {record['step']}: backbone {record['eval_loss']:.3f}"
    if record["eval_recycle_loss"]:
        text += "  recycle " + " ".join(f"{loss:.3f}" for loss in record["eval_recycle_loss"])
        text += "  acceptance " + " ".join(f"{100 * share:.1f}%" for share in record["eval_acceptance"])
    return text
