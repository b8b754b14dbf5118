"""The run on the console: a live progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recycle_ds.config.console import output_console


class RunConsole:
    """Rank 0 prints; the other ranks print nothing."""

    def __init__(self, *, first: bool, steps: int, completed: int) -> None:
        self._first, self._steps = first, steps
        self._progress: Progress | None = None
        self._task: Any = None
        if first and sys.stdout.isatty():
            columns = (
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=output_console())
            self._task = self._progress.add_task("starting", total=steps, completed=completed)
            self._progress.start()

    def step(self, step: int) -> None:
        """Updates the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def metrics(self, record: dict[str, Any]) -> None:
        """Shows a logged step."""
        text = describe(record)
        if self._progress is not None:
            self._progress.update(self._task, description=text)
        else:
            self.say(f"step {record['step']}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        if not self._first:
            return
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Stops the progress bar."""
        if self._progress is not None:
            self._progress.stop()


def describe(record: dict[str, Any]) -> str:
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


def describe_evaluation(record: dict[str, Any]) -> str:
    """An evaluation in one line. The loss is the backbone's."""
    text = f"validation at step {record['step']}: backbone {record['eval_loss']:.3f}"
    if record["eval_recycle_loss"]:
        text += "  recycle " + " ".join(f"{loss:.3f}" for loss in record["eval_recycle_loss"])
        text += "  acceptance " + " ".join(f"{100 * share:.1f}%" for share in record["eval_acceptance"])
    return text
