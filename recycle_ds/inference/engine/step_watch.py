"""How far a rank's program has come, for the thread that shows its signs of life (liveness.py).

A rank whose program hangs inside a step still has a thread that shows signs of life. What tells it from one that computes is
that it takes far longer than for all steps before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

_TIMES = 10
"""A step is taken to hang where it takes so many times as long as the slowest one before it."""


class Progress(NamedTuple):
    """How far a program has come."""

    steps: int = 0
    """Steps that it has begun."""
    exchanges: int = 0
    """Exchanges with the other tensor ranks of its stage that it has begun."""
    computing: bool = False
    """Whether it is inside a step; else it waits for another rank, or for requests."""


class StepWatch:
    """Counts the steps of the main thread and keeps how long the slowest one took. Another thread may read it."""

    def __init__(self, least: float = 8.0, clock: Callable[[], float] = time.monotonic) -> None:
        """least: seconds that a step may always take. clock: in seconds."""
        self._least, self._clock = least, clock
        self._steps = self._most_tokens = 0
        self._computing = False
        self.tokens = 0
        """Tokens of the latest step."""
        self.slowest = 0.0
        """Seconds that the slowest step took."""
        self.exchanges: Callable[[], int] = lambda: 0
        """How many exchanges with other tensor ranks have begun."""

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """A step of so many tokens."""
        start = self._clock()
        self.tokens, self._steps, self._computing = tokens, self._steps + 1, True
        try:
            yield
        finally:
            self._computing = False
        self.slowest = max(self.slowest, self._clock() - start)
        self._most_tokens = max(self._most_tokens, tokens)

    def progress(self) -> Progress:
        """How far the program has come."""
        return Progress(self._steps, self.exchanges(), self._computing)

    @property
    def limit(self) -> float | None:
        """Seconds that a step may stand still; None in the first one, since nothing is known of how fast this machine is."""
        if not self._most_tokens:
            return None
        return max(self._least, _TIMES * self.slowest * max(1.0, self.tokens / self._most_tokens))
