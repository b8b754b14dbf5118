"""The progress bar of `prepare`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from recycle_ds.config.console import output_console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class PrepareBar:
    """A progress bar with counts of documents and tokens, redrawn a few times per second at most."""

    def __init__(self, source: str, shown: bool) -> None:
        self._source, self._shown = source, shown and sys.stderr.isatty()
        self._fraction: float | None = None
        self._next = 0.0

    def __enter__(self) -> PrepareBar:
        if self._shown:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress: Progress = Progress(
                TextColumn("tokenising {task.description}"),
                BarColumn(),
                TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
                TimeElapsedColumn(),
                console=output_console(stderr=True),
            )
            self._progress.start()
            self._task: TaskID = self._progress.add_task(self._source, total=None, documents=0, tokens=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._shown:
            if kind is None:
                self._progress.update(self._task, total=1.0, completed=1.0)
            self._progress.stop()

    def read(self, fraction: float) -> None:
        """Take note of the share of the source that has been read."""
        self._fraction = fraction

    def wrote(self, documents: int, tokens: int) -> None:
        """Take note of what has been written, and draw."""
        now = time.monotonic()
        if self._shown and now >= self._next:
            self._next = now + 0.2
            total = None if self._fraction is None else 1.0
            self._progress.update(
                self._task, total=total, completed=self._fraction or 0.0, documents=documents, tokens=tokens
            )
