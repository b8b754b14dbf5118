"""The timeout of collectives once the run is under way."""

from __future__ import annotations

from recycle_ds.parallel.rendezvous import shorten_timeouts
from recycle_ds.training.faults.watchdog import PATIENCE
from recycle_ds.training.observers import Observer, StepStart


class CollectiveTimeouts(Observer):
    """After the first step, shortens the timeout to a little more than the watchdog allows a save on another rank.

    hang_timeout: the watchdog's, in seconds; 0 leaves the timeout alone.
    """

    every_rank = True
    on_error = "raise"

    def __init__(self, hang_timeout: float) -> None:
        self._hang_timeout = hang_timeout

    def before_step(self, start: StepStart) -> None:
        """At the second step."""
        if self._hang_timeout and start.number == 2:
            shorten_timeouts(PATIENCE * self._hang_timeout + 60)
