"""What a run is in the middle of, and what the loop needs of a checkpointer."""

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
    """Times that the run went back to a checkpoint because of a bad step."""
    recent: tuple[tuple[float, float], ...] = ()
    """(loss, gradient norm) of the last steps that were applied; kept where jumps are looked for."""


class Checkpointer(Protocol):
    """Saves a run so that it can go on, while it goes on. One checkpoint is written at a time."""

    def begin(self, state: TrainingState) -> bool:
        """Copies the state and begins to write it. False where the disk refused it at once. Collective over all ranks."""

    def ended(self) -> bool:
        """Whether this rank has nothing left to write, if anything was begun; `finish` then waits for no disk of its own."""

    def finish(self) -> Path | None:
        """Waits for the writing and publishes. Returns the folder, or None where the disk refused it. Collective."""

    def restore(self) -> tuple[TrainingState, Path] | None:
        """Goes back to the newest whole checkpoint; None where there is none. Collective."""
