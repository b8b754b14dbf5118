"""Progress of self-written text: a bar on a terminal, a line on stderr every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from recycle_ds.config.console import output_console

if TYPE_CHECKING:
    from rich.progress import Progress

_BETWEEN_LINES, _BETWEEN_DRAWINGS = 10.0, 0.2


class TextProgress:
    """Shows how many of the wanted tokens there are, and how many this process writes per second.

    name: of the rank. wanted: tokens of all processes.
    """

    def __init__(self, name: str, wanted: int) -> None:
        self._name, self._wanted = name, wanted
        self._start = self._shown = time.monotonic()
        self._finished = 0
        self.written = 0
        """Tokens that this process has written."""
        self.counts = True
        """Whether new tokens are of the text to train on."""
        self._in_group = 0
        self._bar: Progress | None = None

    @property
    def speed(self) -> float:
        """Tokens per second that this process has written since the start."""
        return self.written / max(time.monotonic() - self._start, 1e-9)

    def finished(self, tokens: int) -> None:
        """Takes note of the tokens in finished groups of all processes. A group of this process begins or has ended."""
        self._finished, self._in_group = tokens, 0
        self._show(again=True)

    def add(self, tokens: int) -> None:
        """Takes note of new tokens."""
        self.written += tokens
        self._in_group += tokens if self.counts else 0
        self._show(again=False)

    def _show(self, again: bool) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self._shown < (_BETWEEN_DRAWINGS if terminal else _BETWEEN_LINES) and not (terminal and again):
            return
        self._shown = now
        done = min(self._finished + self._in_group, self._wanted)
        if not terminal:
            text = f"{self._name}: {done:,} of {self._wanted:,} tokens, {self.speed:,.1f} tokens/s"
            print(text, file=sys.stderr, flush=True)
            return
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            counts = TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, {task.fields[speed]:,.1f} tokens/s")
            columns = (TextColumn(self._name), BarColumn(), counts, TimeRemainingColumn())
            self._bar = Progress(*columns, console=output_console(stderr=True))
            self._bar.start()
            self._bar.add_task("tokens", total=self._wanted, speed=0.0)
        self._bar.update(self._bar.task_ids[0], completed=done, speed=self.speed)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()
