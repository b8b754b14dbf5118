"""Progress of a file of prompts: a bar on a terminal, lines on stderr elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from recycle_ds.config.console import output_console

_SECONDS = 10.0
"""Between two lines of a log."""


class Progress:
    """Shows how many prompts are done, with tokens per second and the acceptance of drafts.

    name: of the rank, for lines. note: called with the text that the job's shell shows.
    """

    def __init__(self, name: str, note: Callable[[str], object]) -> None:
        self._name, self._note = name, note
        self._start = time.monotonic()
        self._tokens = self._tested = self._accepted = 0
        self._bar: Bar | None = None
        self._next_line = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Counts the tokens of a prompt that is done."""
        self._tokens += record["new_tokens"]
        self._tested += sum(record["tested"])
        self._accepted += sum(record["accepted"])

    def show(self, done: int, of: int) -> None:
        """Shows that so many prompts are done."""
        self._note(f"{self._name}: {done}")  # the same text after a restart says that nothing was done meanwhile
        if not sys.stderr.isatty():
            if done == of or time.monotonic() >= self._next_line:
                print(f"{self._name}: {done} of {of} prompts, {self.speed()}", file=sys.stderr, flush=True)
                self._next_line = time.monotonic() + _SECONDS
            return
        if self._bar is None:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
            self._bar = Bar(TextColumn(self._name), *columns, console=output_console(stderr=True))
            self._bar.start()
            self._bar.add_task("prompts", speed="")
        self._bar.update(self._bar.task_ids[0], completed=done, total=of, speed=self.speed())

    def speed(self) -> str:
        """Tokens per second since the start, and the share of drafts that were accepted."""
        text = f"{self._tokens / max(time.monotonic() - self._start, 1e-9):,.1f} tokens/s"
        return f"{text}, acceptance {self._accepted / self._tested:.2f}" if self._tested else text

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()
