"""What the trainer hands to its observers: one immutable record per call. Numbers are those of all ranks, alike on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recycle_ds.config import RecycleError, RunConfig
from recycle_ds.parallel.peers import lost_peer

if TYPE_CHECKING:
    from recycle_ds.model import RecycleGPT

Phase = Literal["starting", "data", "count", "compute", "agree", "update", "log", "save", "evaluate"]
"""Phases of a step, in their order."""
ROLLBACK = "rollback"
"""Name of the event of a rollback: what was logged after its step is undone."""


@dataclass(frozen=True)
class RunStart:
    """A start of the run, before its first step."""

    config: RunConfig
    model: RecycleGPT
    """This rank's part of the model; `model.mesh` has the rank and the process groups."""
    step: int
    """Completed steps: that of the checkpoint from which the run resumes, 0 for a new run."""
    last: int
    """Last step of this start."""


@dataclass(frozen=True)
class StepStart:
    """A step that is about to be run."""

    step: int
    number: int
    """Which step of this start it is, counted from 1; a step that is repeated counts again. The first one compiles, opens
    connections and fills caches."""


@dataclass(frozen=True)
class PhaseStart:
    """A phase of a step that begins."""

    step: int
    phase: Phase


@dataclass(frozen=True)
class StepEnd:
    """A step that was run."""

    step: int
    number: int
    """See `StepStart`."""
    action: str
    """"apply"; after a bad step "skip", "retry" or "rollback"."""
    completed: int
    """Completed steps of the run: `step`, unless the step is repeated or rolled back."""
    loss: float
    """Weighted total that is optimised, before the update."""
    losses: tuple[float, ...]
    """The backbone's loss, then the recycle module's by depth, then those of its confidence."""
    grad_norm: float
    """Norm of all gradients before clipping."""
    grad_norm_by_part: Mapping[str, float]
    learning_rate: float
    seconds: float
    """From the end of the step before, or from its own start if that is later, to its end."""


@dataclass(frozen=True)
class LoggedStep:
    """A step with its line of metrics.jsonl, every `training.log_every` steps."""

    step: int
    metrics: Mapping[str, Any]
    """The line, on rank 0; on another rank without the figures of observers that only rank 0 has."""


@dataclass(frozen=True)
class EvaluationEnd:
    """An evaluation after `step`."""

    step: int
    metrics: Mapping[str, Any]
    """The line of metrics.jsonl."""
    seconds: float


@dataclass(frozen=True)
class SaveEnd:
    """A checkpoint of `step` that was published, or could not be written."""

    step: int
    folder: Path | None
    """None if it could not be written; older checkpoints are intact."""
    seconds: float
    """From its start to its publication. Training continued meanwhile."""
    waited: float
    """Seconds that training waited for it."""


@dataclass(frozen=True)
class Event:
    """An anomaly: a bad step, a rollback, a failed save, a slow rank, or what an observer reports."""

    name: str
    step: int
    text: str
    """One line for the user."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the event's line of metrics.jsonl has beside name, step and time."""


@dataclass(frozen=True)
class RunEnd:
    """The end of this start."""

    step: int
    """Completed steps of the run."""
    reason: str
    """"finished", "stop_at", the reason of a stop request, or the text of `error`."""
    steps: int
    """Steps of this start, repeated ones included."""
    error: BaseException | None = None

    @classmethod
    def by(cls, error: BaseException, step: int, steps: int) -> RunEnd:
        """The end by an error."""
        text = ""
        if isinstance(error, RecycleError):
            text = str(error)
        elif isinstance(error, RuntimeError):
            text = str(lost_peer(error) or error)
        return cls(step, text or "error", steps, error)
