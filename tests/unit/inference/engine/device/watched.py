"""Watches in which order plans are submitted and outcomes collected."""

from __future__ import annotations

from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.plan import PENDING, Outcome, Plan


class Watched:
    """An engine's executor that records the order of plans and outcomes."""

    def __init__(self, engine: DecodingEngine) -> None:
        self._target = engine._executor
        self.ahead = self.most = self.collected = 0
        self.plans: list[Plan] = []
        engine._executor = self

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        self.ahead += any(PENDING in part.tokens for part in plan.parts)
        self.most = max(self.most, len(self.plans) - self.collected)
        self._target.submit(plan)

    def collect(self) -> Outcome:
        self.collected += 1
        return self._target.collect()

    def __getattr__(self, name: str) -> object:
        return getattr(self._target, name)
