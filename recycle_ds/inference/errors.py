"""Errors of decoding that a person at the terminal can cause."""

from __future__ import annotations

from recycle_ds.config import RecycleError


class DecodingError(RecycleError):
    """A request that cannot be decoded as written. One line: the value, the limit and the fix."""
