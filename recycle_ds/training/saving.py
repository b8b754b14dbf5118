"""Saves checkpoints for the loop: starts one, lets training continue while it is written, and publishes it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from recycle_ds.training.observers import Event, SaveEnd
from recycle_ds.training.observers.dispatch import Observers
from recycle_ds.training.state import Checkpointer, TrainingState


@dataclass(frozen=True)
class Saving:
    """A checkpoint that is being written."""

    step: int
    start: float
    waited: float
    """Seconds that training has waited for it so far."""


class Saver:
    """Starts and publishes checkpoints, and tells the observers. Every method except `ended` is collective over all ranks."""

    def __init__(self, checkpointer: Checkpointer, observers: Observers) -> None:
        self._checkpointer, self._observers = checkpointer, observers
        self.saved_step = -1
        """Step of the newest checkpoint of the current trajectory, or -1."""
        self._published = False
        self._saving: Saving | None = None

    def ended(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._checkpointer.ended()

    def start(self, step: int) -> None:
        """Sets the step that the run starts from: a checkpoint's, unless it is 0."""
        self.saved_step, self._published = step, step > 0

    def forget(self) -> None:
        """After a rollback: the same step may have to be saved again, with another position in the data."""
        self.saved_step = -1

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a published checkpoint to roll back to."""
        return self._published

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint has been started that is not published. The same on all ranks."""
        return self._saving is not None

    def begin(self, state: TrainingState) -> None:
        """Copies the state and lets a thread write it. Finishes the previous checkpoint first."""
        self.finish()
        start = time.perf_counter()
        if self._checkpointer.begin(state):
            self._saving = Saving(state.step, start, time.perf_counter() - start)
        else:
            self._failed(SaveEnd(state.step, None, 0.0, 0.0))

    def finish(self, *, writing: bool = False) -> bool:
        """Waits for the checkpoint that was started, if any, and publishes it. Does nothing while some rank is still `writing`.

        False if it could not be written; the run continues.
        """
        if self._saving is None or writing:
            return True
        saving, self._saving = self._saving, None
        wait_start = time.perf_counter()
        folder = self._checkpointer.finish()
        now = time.perf_counter()
        save = SaveEnd(saving.step, folder, now - saving.start, saving.waited + now - wait_start)
        if folder is None:
            self._failed(save)
            return False
        self.saved_step, self._published = saving.step, True
        self._observers.at_save(save)
        return True

    def save_now(self, state: TrainingState) -> bool:
        """Saves the state and waits until it is on disk. False if it could not be written."""
        self.finish()
        if self.saved_step == state.step:
            return True
        self.begin(state)
        return self._saving is not None and self.finish()

    def _failed(self, save: SaveEnd) -> None:
        text = f"step {save.step}: the checkpoint could not be written; older ones are intact"
        self._observers.at_event(Event("save_failed", save.step, text))
        self._observers.at_save(save)
