"""Errors of a run that the user can act on."""

from recycle_ds.config import RecycleError


class LocalError(RecycleError):
    """An error that only this rank has met, so no other rank reports it."""


class TrainingError(RecycleError):
    """The run cannot continue; the message states the cause and the fix."""
