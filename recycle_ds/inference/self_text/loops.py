"""Repetition inside a row: where a text begins to go round in circles, and how much of it repeats."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

MEASURED = 8
"""Length of the n-grams whose repetition is measured, whatever the length of those that end a row."""


class Repetition:
    """Follows the tokens of a row. An n-gram lies within one turn; its earlier occurrences may be in any turn of the row.

    ngram: n. limit: how often an n-gram may occur in the row; 0: any number of times.
    """

    def __init__(self, ngram: int, limit: int) -> None:
        self._ngram, self._limit = ngram, limit
        self._window: deque[int] = deque(maxlen=max(ngram, MEASURED))
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._measured: set[tuple[int, ...]] = set()
        self._own: list[bool] = []
        self._repeats: list[bool] = []
        self.cut: int | None = None
        """Length at which the row is to be cut, once an n-gram has occurred too often: before its second occurrence in
        the model's own text, or its first if it is in a prompt already."""

    def start_turn(self) -> None:
        """Begins a turn: n-grams do not reach over it."""
        self._window.clear()

    def feed(self, tokens: Iterable[int], own: bool) -> None:
        """Adds tokens. own: whether the model has written them; only these count, and only these are cut."""
        for token in tokens:
            self._window.append(token)
            self._own.append(own)
            recent = tuple(self._window)
            self._repeats.append(own and len(recent) >= MEASURED and recent[-MEASURED:] in self._measured)
            if len(recent) >= MEASURED:
                self._measured.add(recent[-MEASURED:])
            if self._limit and len(recent) >= self._ngram:
                self._count(recent[-self._ngram :], len(self._own) - 1)

    def _count(self, ngram: tuple[int, ...], position: int) -> None:
        """Counts an n-gram that ends at a position, unless it overlaps its last occurrence: in a line of dashes all are
        equal."""
        ends = self._ends.setdefault(ngram, [])
        if ends and position - ends[-1] < self._ngram:
            return
        if self.cut is None and self._own[position] and len(ends) >= self._limit:
            again = [end for end in (*ends[1:], position) if self._own[end]]
            self.cut = again[0] - self._ngram + 1
        ends.append(position)

    def own_tokens(self, length: int | None = None) -> int:
        """How many of the first `length` tokens (of all) the model has written."""
        return sum(self._own[:length])

    def repeated(self, length: int | None = None) -> int:
        """How many of the first `length` tokens (of all) the model has written and end an 8-gram that occurred before."""
        return sum(self._repeats[:length])
