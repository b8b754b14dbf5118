"""Calls a run's observers in their order, and decides what follows when one of them fails."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.peers import TakenOver, lost_peer
from recycle_ds.training.errors import LocalError, TrainingError
from recycle_ds.training.observers.observer import Observer
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


class ObserverError(LocalError):
    """An observer of this rank has failed."""


class Observers:
    """A run's observers on this rank, in the order in which they are called.

    Each method but `check` is the method of `Observer` of the same name, for all of them. None of them is collective, unless
    an observer of every rank makes it so.
    """

    def __init__(self, observers: Sequence[Observer], mesh: Mesh) -> None:
        self._first, self._rank = mesh.is_first, mesh.rank
        self._observers = [observer for observer in observers if observer.every_rank or mesh.is_first]
        self._started: list[Observer] = []
        self._methods: dict[str, list[tuple[Observer, Callable[[Any], Any]]]] = {}
        self.failure: str | None = None
        """Why the run must end: what the first observer with on_error="stop" failed of."""
        for observer in self._observers:
            observer._notify = self.at_event

    def at_start(self, start: RunStart) -> None:
        """Raises ObserverError if one fails that must not."""
        for observer in tuple(self._observers):
            self._started.append(observer)
            self._call(observer, observer.at_start, start)
        if self.failure is not None:
            raise ObserverError(f"{self.failure}; correct the observer, or leave it out")

    def before_step(self, start: StepStart) -> None:
        self._each("before_step", start)

    def at_phase(self, phase: PhaseStart) -> None:
        self._each("at_phase", phase)

    def after_step(self, end: StepEnd) -> None:
        self._each("after_step", end)

    def at_log(self, log: LoggedStep) -> None:
        self._each("at_log", log)

    def after_evaluation(self, end: EvaluationEnd) -> None:
        self._each("after_evaluation", end)

    def at_save(self, save: SaveEnd) -> None:
        self._each("at_save", save)

    def at_event(self, event: Event) -> None:
        self._each("at_event", event)

    def figures(self, end: StepEnd) -> dict[str, Any]:
        """The line of metrics of a step: the figures of all observers."""
        line: dict[str, Any] = {}

        def add(method: Callable[[StepEnd], Any]) -> Callable[[StepEnd], None]:
            def merge(end: StepEnd) -> None:
                found = dict(method(end))
                taken = line.keys() & found.keys()
                if taken:
                    raise ValueError(f"the line has the figure {min(taken)} already")
                json.dumps(found)  # here, so that a value that cannot be written is this observer's failure
                line.update(found)

            return merge

        for observer, method in self._overriding("figures"):
            self._call(observer, add(method), end)
        return line

    def at_end(self, end: RunEnd) -> None:
        """Every observer is called, even if another one fails. Raises ObserverError if one fails that must not, unless the run
        ends with an error, which is the one to report."""
        before = self.failure
        for observer in tuple(self._observers):
            # the logs are open from the beginning; others have something to end only if they were started
            if observer.on_error == "raise" or any(observer is one for one in self._started):
                self._call(observer, observer.at_end, end)
        if self.failure == before:
            return
        if end.error is None:
            raise ObserverError(f"{self.failure}; the run had ended: {end.reason} at step {end.step}")
        self._warn(f"{self.failure}")

    def check(self, step: int) -> None:
        """Raises TrainingError if an observer of this rank has failed; `step` is saved."""
        if self.failure is not None:
            raise TrainingError(
                f"{self.failure}; step {step} is saved: correct the observer or leave it out, and start the run again"
            )

    def _each(self, hook: str, record: Any) -> None:
        for observer, method in self._overriding(hook):
            self._call(observer, method, record)

    def _overriding(self, hook: str) -> Sequence[tuple[Observer, Callable[[Any], Any]]]:
        """The observers that define the method."""
        if hook not in self._methods:
            self._methods[hook] = [
                (one, getattr(one, hook))
                for one in self._observers
                if getattr(type(one), hook) is not getattr(Observer, hook)
            ]
        return tuple(self._methods[hook])

    def _call(self, observer: Observer, method: Callable[[Any], Any], record: Any) -> None:
        if all(observer is not one for one in self._observers):  # dropped in the course of this call
            return
        try:
            method(record)
        except Exception as error:
            if observer.on_error == "raise" or isinstance(error, TakenOver) or lost_peer(error) is not None:
                raise
            self._observers = [one for one in self._observers if one is not observer]
            self._methods.clear()
            self._drop(observer, record, error)

    def _drop(self, observer: Observer, record: Any, error: Exception) -> None:
        kind = type(observer)
        place = traceback.extract_tb(error.__traceback__)[-1]
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        failure = (
            f"observer {kind.__module__}:{kind.__qualname__} failed at step {record.step}: {cause} "
            f"({Path(place.filename).name}:{place.lineno})"
        )
        if observer.on_error == "stop" and self.failure is None:
            self.failure = failure
        elif self._first and not isinstance(record, RunEnd):
            self.at_event(Event("observer_dropped", record.step, f"{failure}; it is not called any more"))
        else:  # the logs are closed, or those of rank 0
            self._warn(failure)

    def _warn(self, text: str) -> None:
        print(f"warning: rank {self._rank}: {text}", flush=True)
