"""Time for which a process was awake: a scheduler may suspend a job for hours, after which no other rank is late by that."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST_GAP = 2.0
"""Seconds that count at most between two looks at the clock, of which one is due at least every second."""


class AwakeClock:
    """Seconds for which this process was awake, from the first `tick` on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: in seconds; it runs on while the process is suspended."""
        self._clock, self._last = clock, clock()
        self.now = 0.0
        """The time at the latest tick."""

    def tick(self) -> float:
        """The time now."""
        last, self._last = self._last, self._clock()
        self.now += min(self._last - last, LONGEST_GAP)
        return self.now
