"""What was compiled and how long that took: one line on the console, once it is known."""

from __future__ import annotations

from collections.abc import Callable

from recycle_ds.training.observers import LoggedStep, Observer


class CompileTime(Observer):
    """Prints one line after the first logged step; nothing if there is nothing to say."""

    on_error = "raise"

    def __init__(self, report: Callable[[], str]) -> None:
        """report: what to print, known after the first steps."""
        self._report: Callable[[], str] | None = report

    def at_log(self, log: LoggedStep) -> None:
        """Prints the line once."""
        report, self._report = self._report, None
        if report is not None and (text := report()):
            print(text, flush=True)
