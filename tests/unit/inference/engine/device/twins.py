"""Runs every plan on the runner without padding and on the one with static buffers, and compares what they chose."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from recycle_ds.inference.engine.build import Steps, local_engine
from recycle_ds.inference.engine.device import fields
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.executor import LocalExecutor
from recycle_ds.inference.engine.plan import Chosen, Outcome, Plan
from recycle_ds.model import RecycleGPT


class Twins:
    """An executor of two runners with caches of their own."""

    depth = 1
    computing = False
    first_runs = None

    def __init__(self, flat: LocalExecutor, static: LocalExecutor, *, compare_drafts: bool = True) -> None:
        """compare_drafts: whether drafts have to be the same too, which rounding of a GPU may change."""
        self._flat, self._static, self._compare_drafts = flat, static, compare_drafts
        self.seen: Counter[str] = Counter()
        """How often each kind of step occurred."""

    def submit(self, plan: Plan) -> None:
        """Runs a plan on both. Trees end by their depth alone: the device cannot end them earlier."""
        plan = replace(plan, parts=tuple(replace(part, floor=0) for part in plan.parts))
        self._flat.submit(plan)
        self._static.submit(plan)
        rules = self._static._runner._rules
        self.seen["fits" if fields.fits(plan, rules) else "does not fit"] += bool(plan.parts)
        self.seen["moves"] += len(plan.moves)
        self.seen["copies"] += len(plan.copies)
        self.seen["chunks"] += sum(not part.samples for part in plan.parts)
        self.seen["mixed"] += len({part.start >= part.prompt_tokens for part in plan.parts}) == 2

    def collect(self) -> Outcome:
        """Compares both outcomes, and returns the first."""
        expected, found = self._flat.collect(), self._static.collect()
        assert [one.sequence for one in found] == [one.sequence for one in expected]
        for mine, other in zip(found, expected, strict=True):
            self._compare(mine, other)
        return expected

    def _compare(self, found: Chosen, expected: Chosen) -> None:
        assert found.tokens == expected.tokens
        self.seen["accepted"] += len(found.tokens) - 1
        if not self._compare_drafts:
            return
        assert (found.drafts, found.parents, found.calls) == (expected.drafts, expected.parents, expected.calls)
        assert all(abs(a - b) < 2e-4 for a, b in zip(found.confidences, expected.confidences, strict=True))
        self.seen["chains"] += bool(found.drafts) and not found.parents
        self.seen["trees"] += bool(found.parents)

    def discard(self) -> None:
        """See `Executor`."""
        self._flat.discard()
        self._static.discard()

    def explanation(self) -> str:
        """See `Executor`."""
        return ""

    def keep_alive(self) -> None:
        """See `Executor`."""

    def close(self) -> None:
        """See `Executor`."""


def twin_engine(
    model: RecycleGPT,
    max_batch: int,
    kv_memory_gib: float | None = None,
    eos: int | None = None,
    *,
    steps: Steps = "static",
    compare_drafts: bool = True,
) -> tuple[DecodingEngine, Twins]:
    """An engine that runs every plan twice."""
    both = [
        local_engine(
            model, max_batch=max_batch, kv_memory_gib=kv_memory_gib, eos_ids=() if eos is None else (eos,),
            compiled=False, steps=kind,
        )
        for kind in ("flat", steps)
    ]  # fmt: skip
    twins = Twins(both[0]._executor, both[1]._executor, compare_drafts=compare_drafts)
    both[0]._executor = twins
    return both[0], twins
