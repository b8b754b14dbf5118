"""The state of a run, and the checkpointer interface that the loop uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class TrainingState:
    """Position of a run after `step` optimizer steps. `next_sample` is the number of the first sample not yet drawn."""

    step: int = 0
    next_sample: int = 0
    skipped: int = 0
    rollbacks: int = 0
    """Number of rollbacks to a checkpoint because of a bad step."""
    recent: tuple[tuple[float, float], ...] = ()
    """(loss, gradient norm) of the last applied steps; empty unless spikes are detected."""


class Checkpointer(Protocol):
    """Saves a run's state for a resume, while training continues. One checkpoint is written at a time."""

    def begin(self, state: TrainingState) -> bool:
        """Copies the state and starts to write it. False if writing failed at once. Collective over all ranks."""

    def ended(self) -> bool:
        """Whether this rank has nothing left to write, so that `finish` does not wait for this rank's disk."""

    def finish(self) -> Path | None:
        """Waits for the writing and publishes. Returns the folder, or None if writing failed. Collective."""

    def restore(self) -> tuple[TrainingState, Path] | None:
        """Restores the newest intact checkpoint; None if there is none. Collective."""
