"""How far the thread that decodes has come, for the one that shows a rank's signs of life (liveness.py).

A rank whose program hangs inside a step still shows signs of life. What tells it from one that computes is that nothing goes
on: no exchange with other ranks begins, and for a shorter time, no processor time is used either.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from recycle_ds.parallel.awake import LONGEST_GAP, AwakeClock

_TIMES = 10
"""A step may stand still for so many times as long as the slowest one before took, for its number of positions."""
_IDLE_SHARE = 0.1
"""A process that uses less than this share of one core, and reads no page from a disk, computes nothing."""
WAITING, COMPUTING, FAILED = range(3)


class Progress(NamedTuple):
    """How far a rank has come."""

    steps: int = 0
    """Steps that it has begun."""
    exchanges: int = 0
    """Exchanges with the other tensor ranks of its stage that it has begun."""
    state: int = WAITING
    """COMPUTING inside a step, FAILED after one that ended with an exception, else WAITING for another rank or for requests."""


class StepWatch:
    """Counts steps, and keeps how long the slowest one took. Another thread may read it, and must call `look` every second."""

    def __init__(
        self, blocked: float | None = 8.0, busy: float = 120.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """blocked: seconds that a step may always stand still without using a processor; None where it waits for a GPU, which
        looks the same. busy: the same if it uses one. clock: in seconds."""
        self._blocked, self._busy, self._clock = blocked, busy, clock
        self._awake = AwakeClock(clock)
        self._steps = self._size = self._largest = 0
        self._state = WAITING
        self._slowest = 0.0
        self._used, self._used_at = (0.0, 0), 0.0
        self.exchanges: Callable[[], int] = lambda: 0
        """How many exchanges with other tensor ranks have begun."""

    @contextmanager
    def step(self, size: int) -> Iterator[None]:
        """A step. size: positions that it reads."""
        start, awake = self._clock(), self._awake.now
        self._size, self._steps, self._state = size, self._steps + 1, COMPUTING
        try:
            yield
        except BaseException:
            self._state = FAILED
            raise
        self._state = WAITING
        # the second one is coarse, and does not count a time for which the process was suspended
        seconds = min(self._clock() - start, self._awake.now - awake + LONGEST_GAP)
        self._slowest, self._largest = max(self._slowest, seconds), max(self._largest, size)

    def progress(self) -> Progress:
        """How far this rank has come."""
        return Progress(self._steps, self.exchanges(), self._state)

    def look(self) -> float:
        """Notes what the process has used since the last look. Returns the seconds for which it was awake."""
        before, now = self._awake.now, self._awake.tick()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = usage.ru_utime + usage.ru_stime, usage.ru_majflt
        if used[0] - self._used[0] > _IDLE_SHARE * (now - before) or used[1] > self._used[1]:
            self._used_at = now
        self._used = used
        return now

    def hangs(self, since: float) -> bool:
        """Whether the step under way hangs, if nothing has gone on since then (by `look`). Never the first one: nothing is
        known of how fast the model is on this machine."""
        if not self._largest or self._state != COMPUTING:
            return False
        now, least = self._awake.now, _TIMES * self._slowest * max(1.0, self._size / self._largest)
        is_blocked = self._blocked is not None and now - max(since, self._used_at) > max(self._blocked, least)
        return is_blocked or now - since > max(self._busy, least)
