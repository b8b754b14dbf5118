"""The detokeniser that decoding requires."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class TextSource(Protocol):
    """Incremental detokeniser. A character that spans several tokens is returned with the last of them."""

    def feed(self, token_id: int, /) -> str:
        """Returns the text that this token completes, possibly empty."""

    def flush(self) -> str:
        """Returns the text still held back. To be called at the end of the sequence."""


NewTextSource = Callable[[Sequence[int]], TextSource]
"""Creates the detokeniser of an answer, given the ids of its prompt."""
