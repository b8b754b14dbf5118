"""When a process that has no group of its own left writes one of another process."""

from __future__ import annotations

import time
from collections.abc import Callable

_UNKNOWN = 600.0
"""Seconds to wait as long as no group has been finished, so that nothing is known about their time."""
_SHORTEST_LOOK, _LONGEST_LOOK = 0.1, 2.0


class Takeover:
    """Waits about the usual time of a group: by then, a process that is still running has finished the one that is missing.

    Times are those of the groups that this process has written. Without one, twice the time until another process has
    finished the first one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self._clock = clock
        self._start = clock()
        self._seen: int | None = None
        self._of_others: float | None = None
        self._own: float | None = None
        self._idle: float | None = None

    def wrote(self, seconds: float, *, own: bool, published: bool) -> None:
        """Takes note of a group that this process has worked on. published: no other process finished it first."""
        if published:
            self._own = max(seconds, self._own or 0.0)
        if own or not published:  # else its process is lost, and those that it leaves behind are due at once
            self._idle = None

    def is_due(self, finished: int) -> bool:
        """Whether to write a group of another process now. finished: number of all finished groups."""
        now = self._clock()
        if self._seen is None:
            self._seen = finished
        if self._of_others is None and finished > self._seen:
            self._of_others = now - self._start
        if self._idle is None:
            self._idle = now
        usual = _UNKNOWN
        if self._own is not None:
            usual = self._own
        elif self._of_others is not None:
            usual = 2 * self._of_others
        return now - self._idle >= usual

    @property
    def pause(self) -> float:
        """Seconds until the next look at what others have finished."""
        idle = 0.0 if self._idle is None else self._clock() - self._idle
        return min(max(idle / 10, _SHORTEST_LOOK), _LONGEST_LOOK)
