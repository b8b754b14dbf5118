"""Error of the data package."""

from __future__ import annotations

from recycle_ds.config.errors import RecycleError


class DataError(RecycleError):
    """A corpus, tokenizer or token file that cannot be used."""
