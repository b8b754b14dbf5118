"""Waiting for another rank to change a number in shared memory: soon, as a rule, and without a message that would wake us."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from recycle_ds.parallel.awake import AwakeClock

# Looks between two offers of the core to other processes, while the rank does not sleep.
_SPINS = 200
# Seconds after which the rank sleeps between looks, and for how long: it must not occupy a core that others need. Nor may it
# keep its own other threads waiting: one that only gives up Python's lock to take it again at once can starve them for many
# seconds. After a second, as in a server without requests, it sleeps longer: a core would be busy by a twentieth for nothing.
_PATIENCE, _SLEEP = 0.01, 0.0005
_LONG_PATIENCE, _LONG_SLEEP = 1.0, 0.005


def wait_until(done: Callable[[], bool], timeout: float | None = None) -> bool:
    """Waits until `done` says so. timeout: in seconds for which this process is awake. Returns whether it did in time."""
    for _ in range(_SPINS):
        if done():
            return True
    clock = AwakeClock()
    while (waited := clock.tick()) < _PATIENCE:
        os.sched_yield()
        for _ in range(_SPINS):
            if done():
                return True
    while not done():
        time.sleep(_SLEEP if waited < _LONG_PATIENCE else _LONG_SLEEP)
        waited = clock.tick()
        if timeout is not None and waited > timeout:
            return False
    return True
