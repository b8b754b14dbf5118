"""Errors of reading and writing checkpoints."""

from recycle_ds.config import RecycleError


class CheckpointError(RecycleError):
    """A checkpoint cannot be read, written or used. Nothing was changed."""
