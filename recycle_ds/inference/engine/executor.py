"""Runs plans in this process. `distributed.py` has the executor that spreads them over ranks."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from recycle_ds.inference.engine.plan import Outcome, Plan
from recycle_ds.inference.engine.runner import Runner


class Executor(Protocol):
    """Runs plans in the order in which they are submitted."""

    @property
    def depth(self) -> int:
        """Plans that can be under way at once: pipeline stages."""

    def submit(self, plan: Plan) -> None:
        """Starts a plan."""

    def collect(self) -> Outcome:
        """Waits for the oldest plan under way and returns what it chose."""

    def discard(self) -> None:
        """Forgets all plans under way, after an exception."""

    def explanation(self) -> str:
        """How busy the ranks were since the last call; empty for a single one. No plan may be under way."""

    def keep_alive(self) -> None:
        """Lets ranks that wait for a plan wait anew: a process group bounds how long one receive may take."""

    def close(self) -> None:
        """Ends the other ranks' part. No plan may follow."""


class LocalExecutor:
    """One process: a plan is computed when it is submitted."""

    depth = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._outcomes: deque[Outcome] = deque()

    def submit(self, plan: Plan) -> None:
        """See `Executor`."""
        outcome = self._runner.run(plan)
        assert isinstance(outcome, tuple), "a single process has the last stage"
        self._outcomes.append(outcome)

    def collect(self) -> Outcome:
        """See `Executor`."""
        return self._outcomes.popleft()

    def discard(self) -> None:
        """See `Executor`."""
        self._outcomes.clear()

    def explanation(self) -> str:
        """See `Executor`."""
        return ""

    def keep_alive(self) -> None:
        """See `Executor`."""

    def close(self) -> None:
        """See `Executor`."""
