"""Decoding errors caused by user input."""

from __future__ import annotations

from recycle_ds.config import RecycleError


class DecodingError(RecycleError):
    """A request that is invalid or cannot be decoded. The message is one line: the value, the limit and the fix."""
