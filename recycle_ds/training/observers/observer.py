"""The base class of everything that watches a run: logs, heartbeats, profilers, and what a user adds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from recycle_ds.training.observers.records import (
    EvaluationEnd,
    Event,
    LoggedStep,
    PhaseStart,
    RunEnd,
    RunStart,
    SaveEnd,
    StepEnd,
    StepStart,
)


class Observer:
    """Is called at fixed points of the training loop; every method does nothing unless a subclass defines it.

    No record has to be waited for: an observer that reads tensors of a GPU makes the loop wait for them.
    """

    every_rank: ClassVar[bool] = False
    """Whether every rank has it, or rank 0 only. Collectives are for observers of every rank."""
    on_error: ClassVar[Literal["stop", "drop", "raise"]] = "stop"
    """What follows an exception. "stop": all ranks save after the current step and end the run with an error that names the
    observer. "drop": it is reported and the observer is not called any more. "raise": it propagates like one of the loop's."""
    _notify: Callable[[Event], None] | None = None

    def at_start(self, start: RunStart) -> None:
        """Before the first step of this start."""

    def before_step(self, start: StepStart) -> None:
        """Before every step, also one that is repeated."""

    def at_phase(self, phase: PhaseStart) -> None:
        """At the begin of each phase of a step."""

    def after_step(self, end: StepEnd) -> None:
        """After every step, before it is logged and saved. On a GPU, one with nothing to follow at once ends when its numbers
        are there: the next step has been launched by then, and has left its gradients, but has changed no weight."""

    def figures(self, end: StepEnd) -> Mapping[str, Any]:
        """Figures for the step's line of metrics, by a name that the line does not have yet; JSON values. Called after
        `after_step`, every `training.log_every` steps."""
        return {}

    def at_log(self, log: LoggedStep) -> None:
        """At a logged step, with its line of metrics."""

    def after_evaluation(self, end: EvaluationEnd) -> None:
        """After an evaluation, with its line of metrics."""

    def at_save(self, save: SaveEnd) -> None:
        """When a checkpoint was published, or could not be written."""

    def at_event(self, event: Event) -> None:
        """At an anomaly."""

    def at_end(self, end: RunEnd) -> None:
        """At the end, also after an error. Not collective: the other ranks may be gone."""

    def report(self, name: str, step: int, text: str, **details: Any) -> None:
        """Reports an anomaly to all observers of this rank: rank 0 prints a warning, writes a line of metrics.jsonl and counts
        it in the summary. details: JSON values. Raises TypeError for any other value."""
        json.dumps(details)
        if self._notify is not None:
            self._notify(Event(name, step, text, details))
