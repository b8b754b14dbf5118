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


class Checkpointer(Protocol):
    """Saves a run so that it can go on. Collective over all ranks."""

    def save(self, state: TrainingState) -> Path | None:
        """Writes a checkpoint and returns its folder, or None where the disk refused it and the run goes on without."""
        ...
