"""Reports ranks that are slower than their peers."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from torch import nn

from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.faults.stragglers import WorkTimer, slowest
from recycle_ds.training.observers import EvaluationEnd, Observer, PhaseStart, StepEnd, StepStart

_NOTICEABLE = 0.1
"""Seconds of a rank's own work in a step below which no rank is reported as slow."""


class SlowRanks(Observer):
    """Adds the ranks' own working time to logged steps, and reports a slow rank.

    ratio: a rank is slow if it needs more than this many times its peers' median.
    """

    every_rank = True  # the times are gathered: collective on logged steps
    on_error = "raise"

    def __init__(self, module: nn.Module, mesh: Mesh, ratio: float) -> None:
        """module: see `WorkTimer`."""
        self._work, self._stages, self._ratio = WorkTimer(module, mesh), mesh.pipeline.size, ratio
        self._reading_since = 0.0
        self._has_first_step = False

    def before_step(self, start: StepStart) -> None:
        """The first step of a start is slow on some rank or other."""
        if start.number == 1:
            self._work.reset()  # the dry run
            self._has_first_step = True

    def at_phase(self, phase: PhaseStart) -> None:
        """Times the reading of a step's data."""
        if phase.phase == "data":
            self._reading_since = time.perf_counter()
        elif phase.phase == "count":
            self._work.data(time.perf_counter() - self._reading_since)

    def figures(self, end: StepEnd) -> dict[str, Any]:
        """Median and maximum over the ranks, in seconds per step. Collective."""
        seconds = self._work.gather()
        rank, most, ratio = slowest(seconds, self._stages)
        if not self._has_first_step and ratio > self._ratio and most >= _NOTICEABLE:
            host = self._work.host_of(rank)
            self.report(
                "straggler",
                end.step,
                f"rank {rank} on {host} needs {most:.2f} s per step for its own work, {ratio:.1f} times the median of its "
                "peers",
                rank=rank,
                host=host,
                ratio=ratio,
            )
        self._has_first_step = False
        return {"rank_seconds": {"median": median(seconds), "slowest": most, "slowest_rank": rank}}

    def after_evaluation(self, end: EvaluationEnd) -> None:
        """Its forward passes are no part of a step."""
        self._work.reset()
