"""Errors of a run that the user can act on."""

from recycle_ds.config import RecycleError


class OwnError(RecycleError):
    """An error that this rank alone has met: no other rank tells it."""


class TrainingError(RecycleError):
    """The run cannot go on; the message says why and what to do."""
