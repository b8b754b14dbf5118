"""Where a call's tokens are in the cache and what they see, as the kernels read it: see `Step` in c/stack.h."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from recycle_ds.inference.native.spans import Span

BLOCK = 16
"""Positions of a block of the cache."""


class Places:
    """Arrays of the tokens of some spans, one after the other."""

    __slots__ = ("blocks", "copied", "longest", "lowest", "moved", "paths", "positions", "slots", "table")

    def __init__(self, spans: Sequence[Span]) -> None:
        self.slots, self.lowest, self.table, self.blocks = array("i"), array("i"), array("i"), array("i")
        self.longest = 0
        for span in spans:
            count, end = span.count, span.first + span.count
            if count == 1:
                self.slots.append(span.first)
                self.lowest.append(span.lowest)
                self.table.append(len(self.blocks))
            else:
                self.slots.extend(range(span.first, end))
                self.lowest.extend([span.lowest] * count)
                self.table.extend([len(self.blocks)] * count)
            self.blocks.extend(span.blocks)
            if end > self.longest:
                self.longest = end
        self.positions = self.slots
        self.paths: array[int] | None = None
        self.moved = array("i")
        self.copied = 0
        if any(span.parents for span in spans):
            self._add_trees(spans)

    def _add_trees(self, spans: Sequence[Span]) -> None:
        """Positions of nodes, and the slots of ancestors that are not at their positions."""
        self.positions, self.paths = array("i"), array("i")
        for span in spans:
            for slot in range(span.first, span.end):
                path = span.path(slot)
                self.positions.append(span.root + len(path) if path else slot)
                own = span.root + 1  # the position of the path's first entry, later of its first one in another slot
                while own - span.root <= len(path) and path[own - span.root - 1] == own:
                    own += 1
                kept = path[own - span.root - 1 :]
                self.paths.append(len(self.moved) if kept else -1)
                if kept:
                    self.moved.append(own)
                    self.moved.extend(kept)
                    self.copied = max(self.copied, self.positions[-1] // BLOCK - own // BLOCK + 1)
