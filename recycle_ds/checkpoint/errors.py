"""Errors of reading and writing checkpoints."""

from recycle_ds.config import RecycleError


class CheckpointError(RecycleError):
    """A checkpoint that cannot be used; nothing was changed."""
