"""Reasons to stop: signals on any rank, a stop file, the end of the job, a later start of it that has taken over. The ranks
agree on them at a step boundary."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
JOB_SIGNAL, TIME_LIMIT = "job signal", "time limit"
STOP_FILE = "stop file"
"""A person's wish: a job does not start again."""
TAKEN_OVER = "taken over"
"""Without saving, unlike for every other reason."""
REASONS = (*STOP_SIGNALS, JOB_SIGNAL, TIME_LIMIT, STOP_FILE, TAKEN_OVER)
"""Why a run that is not finished may end. Ranks vote by place; the last one that has a vote wins."""


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `reason` instead of ending the process, however often they come.

    files: what to look for at every step, and the reason that each one is; the last one that is there counts. One rank need
    have them. end: unix time at which the job is ended from outside.
    taken_by: who has taken over what this process works on, asked at every step; None for nobody.
    """

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

    def poll(self, margin: float) -> str | None:
        """Why to stop now, if at all; `margin` is how many seconds before the job's end that is. A person's wish counts more
        than what came before it."""
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

    def obeyed(self) -> None:
        """Takes the stop files away, or the next start would stop as well."""
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
