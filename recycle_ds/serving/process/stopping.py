"""When the server must shut down: a signal, or the stop file of its batch job."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
JOB_ENDS = "the job ends"
_LOOK = 1.0
"""Seconds between two looks for the file, which is on a shared file system."""
_SAME_REQUEST = 1.0
"""Seconds within which several signals are one: deepspeed and torchrun pass on what the terminal has already sent."""


class StopSignals:
    """Notes the first stop signal; a second one ends the process at once.

    file: created by the shell of a batch job when the job must end. latest: unix time at which to stop in any case. A rank
    that only follows another one notes signals too, and ends when the other one does.
    """

    def __init__(self, file: Path | None = None, latest: float | None = None) -> None:
        self._file, self._latest = file, latest
        self._first: float | None = None
        self._next_look = 0.0
        self.reason: str | None = None

    def install(self) -> None:
        """Installs the handlers, in the main thread, for the rest of the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def poll(self) -> str | None:
        """Why to shut down; None to go on."""
        now = time.monotonic()
        if self.reason is None and now >= self._next_look:
            self._next_look = now + _LOOK
            late = self._latest is not None and time.time() >= self._latest
            if late or (self._file is not None and self._file.exists()):
                self.reason = JOB_ENDS
        return self.reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._first is None:
            self._first = now
            self.reason = self.reason or name
        elif now - self._first > _SAME_REQUEST:
            os.write(sys.stderr.fileno(), f"{name}, the second signal: the process ends at once\n".encode())
            os._exit(128 + number)
