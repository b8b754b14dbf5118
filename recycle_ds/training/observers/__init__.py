"""Observers of a training run: the base class, and the records that they get."""

from recycle_ds.training.observers.observer import Observer
from recycle_ds.training.observers.records import (
    ROLLBACK,
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

__all__ = [
    "ROLLBACK",
    "EvaluationEnd",
    "Event",
    "LoggedStep",
    "Observer",
    "PhaseStart",
    "RunEnd",
    "RunStart",
    "SaveEnd",
    "StepEnd",
    "StepStart",
]
