"""When the loop saves: begins a checkpoint, lets training go on while it is written, and publishes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from recycle_ds.training.state import Checkpointer, TrainingState


@dataclass(frozen=True)
class Saving:
    """A checkpoint that is being written."""

    step: int
    begun: float
    waited: float
    """Seconds that training stood still for it so far."""


class Saver:
    """Every method but `ended` is collective over all ranks.

    say: tells the person in front of it. failed: takes note of a step whose checkpoint the disk refused. done: takes note of
    the step of a checkpoint that was published, and the seconds that training stood still for it.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        say: Callable[[str], None],
        failed: Callable[[int], None],
        done: Callable[[int, float], None],
    ) -> None:
        self._checkpointer = checkpointer
        self._say, self._failed, self._done = say, failed, done
        self.saved_step = -1
        """Step of the newest checkpoint that is the present course's."""
        self._published = False
        self._saving: Saving | None = None
        self.longest = 0.0
        """Seconds that the slowest checkpoint took so far, from its beginning to its publication."""

    def ended(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._checkpointer.ended()

    def start(self, step: int) -> None:
        """A run goes on from `step`: from a checkpoint, if that is not 0."""
        self.saved_step, self._published = step, step > 0

    def forget(self) -> None:
        """After going back: the same step may have to be saved again, with another position in the data."""
        self.saved_step = -1

    @property
    def any(self) -> bool:
        """Whether there is a published checkpoint to go back to."""
        return self._published

    def begin(self, state: TrainingState) -> None:
        """Copies the state and lets a thread write it; waits for the one before, if that is not done."""
        self.finish()
        begun = time.perf_counter()
        if self._checkpointer.begin(state):
            self._saving = Saving(state.step, begun, time.perf_counter() - begun)
        else:
            self._failed(state.step)

    def finish(self, *, writing: bool = False) -> bool:
        """Publishes what was begun, if anything was, waiting for it if need be; not while it is still `writing` on some rank.

        False where the disk refused it: the run goes on.
        """
        if self._saving is None or writing:
            return True
        saving, self._saving = self._saving, None
        asked = time.perf_counter()
        folder = self._checkpointer.finish()
        now = time.perf_counter()
        self.longest = max(self.longest, now - saving.begun)
        if folder is None:
            self._failed(saving.step)
            return False
        self.saved_step, self._published = saving.step, True
        waited = saving.waited + now - asked
        self._done(saving.step, waited)
        self._say(f"saved {folder} in {now - saving.begun:.1f} s; training waited {waited:.2f} s")
        return True

    def now(self, state: TrainingState) -> bool:
        """Has the state on disk when it returns. False where the disk refused it."""
        self.finish()
        if self.saved_step == state.step:
            return True
        self.begin(state)
        return self._saving is not None and self.finish()
