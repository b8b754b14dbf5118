"""Reasons to stop: a signal on any rank, a stop file, the end of the job, a later start of the job that has taken over. The
ranks agree on one at a step boundary."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from recycle_ds.training.observers import EvaluationEnd, Observer, SaveEnd, StepEnd

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
JOB_SIGNAL, TIME_LIMIT = "job signal", "time limit"
STOP_FILE = "stop file"
"""A user's request: the job is not requeued."""
TAKEN_OVER = "taken over"
"""The only reason for which the run does not save."""
REASONS = (*STOP_SIGNALS, JOB_SIGNAL, TIME_LIMIT, STOP_FILE, TAKEN_OVER)
"""Why an unfinished run may end, in rising priority: if ranks have several reasons, the last of them wins."""


class StopRequest(Observer):
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `reason` instead of ending the process, however many arrive.

    files: stop files to look for at every step, each with its reason; the last one that exists wins. Only one rank needs them.
    end: Unix time at which the job is ended from outside.
    taken_by: called at every step; names the process that has taken over this one's work, or None.

    As an observer of the run it measures how long a stop takes.
    """

    every_rank = True  # a signal may reach any rank
    on_error = "raise"

    def __init__(
        self,
        files: Mapping[Path, str] | None = None,
        end: float | None = None,
        taken_by: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.reason: str | None = None
        self.taker: str | None = None
        self._files, self._end, self._taken_by = files or {}, end, taken_by
        self._previous: dict[signal.Signals, Any] = {}
        self._longest_step = self._longest_save = self._longest_evaluation = 0.0

    def poll(self, margin: float) -> str | None:
        """The reason to stop now, or None. margin: seconds before the job's end at which to stop. A user's stop file
        overrides an earlier reason."""
        found = [reason for file, reason in self._files.items() if os.path.exists(file)]
        self.taker = self._taken_by()
        if self.taker is not None:
            self.reason = TAKEN_OVER
        elif STOP_FILE in found:
            self.reason = STOP_FILE
        elif self.reason is None:
            if found:
                self.reason = found[-1]
            elif self._end is not None and time.time() + margin >= self._end:
                self.reason = TIME_LIMIT
        return self.reason

    @property
    def needed(self) -> float:
        """Seconds that a run may need to stop, by the longest step, save and evaluation so far. The ranks may know of a request
        only when the step after it has been launched."""
        return 3 * self._longest_step + 2 * self._longest_save + self._longest_evaluation

    def after_step(self, end: StepEnd) -> None:
        """The first step compiles, opens connections, fills caches: it does not count."""
        if end.number > 1:
            self._longest_step = max(self._longest_step, end.seconds)

    def at_save(self, save: SaveEnd) -> None:
        """See `needed`."""
        self._longest_save = max(self._longest_save, save.seconds)

    def after_evaluation(self, end: EvaluationEnd) -> None:
        """See `needed`."""
        self._longest_evaluation = max(self._longest_evaluation, end.seconds)

    def remove_stop_files(self) -> None:
        """Removes the stop files, or the next start would stop as well."""
        for file in self._files:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                print(f"warning: {file} cannot be removed: {error.strerror or error}", flush=True)

    def __enter__(self) -> StopRequest:
        for number in (signal.Signals[name] for name in STOP_SIGNALS):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed from C

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
