"""Errors that a user of the server can cause."""

from recycle_ds.config.errors import RecycleError


class ServingError(RecycleError):
    """The server cannot start or go on: a port that is in use, a wrong number of ranks, a lost rank."""
