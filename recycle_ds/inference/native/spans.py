"""Where a step's tokens are in the cache: plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence that attend: queries at slots first..first+count-1, keys at slots lowest..query.

    With `parents`, the slots after `root` hold the nodes of a tree, node k in slot root + k. A node sees the slots up to
    the root, its ancestors and itself, and its position is that of the root plus its depth.
    """

    blocks: Sequence[int]
    first: int
    count: int
    lowest: int = 0
    root: int = 0
    """Slot of the token from which the tree grows."""
    parents: Sequence[int] = ()
    """Parents of the nodes 1, 2, ... up to the span's last slot: 0 for the root, else an earlier node. Empty: no tree."""

    @property
    def end(self) -> int:
        """The first slot that is not read."""
        return self.first + self.count

    def path(self, slot: int) -> list[int]:
        """The slots of a node's ancestors after the root, and its own, by depth; empty up to the root or without a tree."""
        node, found = slot - self.root if self.parents else 0, []
        while node > 0:
            found.append(self.root + node)
            node = self.parents[node - 1]
        return found[::-1]

    def position(self, slot: int) -> int:
        """The position in the text of what lies in a slot."""
        path = self.path(slot)
        return self.root + len(path) if path else slot


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
