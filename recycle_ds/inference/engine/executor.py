"""Runs plans in this process. `distributed.py` has the executor that spreads them over ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from recycle_ds.inference.engine.plan import Outcome, Plan
from recycle_ds.inference.engine.runner import Runner
from recycle_ds.inference.engine.step_watch import StepWatch


class Executor(Protocol):
    """Runs plans in the order in which they are submitted."""

    @property
    def depth(self) -> int:
        """Plans that can be under way at once: pipeline stages."""

    @property
    def computing(self) -> bool:
        """Whether the oldest plan under way is being computed by a device while the host goes on: then the plan after it can
        be made, and submitted, before its outcome is collected."""

    @property
    def first_runs(self) -> int | None:
        """See `Runner.first_runs`."""

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
    """One process: a plan is computed when it is submitted, or by a device from then on."""

    depth = 1

    def __init__(self, runner: Runner, watch: StepWatch | None = None) -> None:
        """watch: is told of steps."""
        self._runner, self._watch = runner, watch or StepWatch()
        self._outcomes: deque[Outcome | Callable[[], Outcome]] = deque()

    @property
    def computing(self) -> bool:
        """See `Executor`."""
        return bool(self._outcomes) and callable(self._outcomes[0])

    @property
    def first_runs(self) -> int | None:
        """See `Executor`."""
        return self._runner.first_runs

    def submit(self, plan: Plan) -> None:
        """See `Executor`."""
        with self._watch.step(plan.size):
            self._outcomes.append(self._runner.launch(plan))

    def collect(self) -> Outcome:
        """See `Executor`."""
        outcome = self._outcomes.popleft()
        if not callable(outcome):
            return outcome
        with self._watch.step(0):  # the rest of it
            return outcome()

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
