"""Where a step's tokens are in the cache: plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


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


def divided(spans: Sequence[Span], most: int) -> list[list[Span]]:
    """The same tokens in the same order, in groups of at most `most` tokens. A span may be divided."""
    groups: list[list[Span]] = [[]]
    left = most
    for span in spans:
        start = span.first
        while start < span.end:
            if left == 0:
                groups.append([])
                left = most
            count = min(span.end - start, left)
            groups[-1].append(replace(span, first=start, count=count))
            start, left = start + count, left - count
    return groups
