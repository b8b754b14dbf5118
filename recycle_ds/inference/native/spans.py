"""Where a step's tokens are in the cache: plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence that attend: queries at slots first..first+count-1, keys at slots lowest..query."""

    blocks: Sequence[int]
    first: int
    count: int
    lowest: int = 0

    @property
    def end(self) -> int:
        """The first slot that is not read."""
        return self.first + self.count
