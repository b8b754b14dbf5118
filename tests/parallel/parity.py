"""Helpers of the parity suites: runs of a tiny model over several ranks, compared with the single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_in_sets
from tests.parallel.ranks import run_all
from tests.runs import figures, tiny_run, zero

Change = dict[str, Any]
Curve = list[list[float]]

PIPELINE = zero(1).replace("zero1", "pipeline")


def run_cases(corpus: Path, root: Path, world_size: int, cases: dict[str, Change]) -> None:
    """Runs all cases, several in one set of processes. Each case writes its metrics to root/name."""
    runs = [tiny_run(corpus, root / name, **change) for name, change in cases.items()]
    assert run_in_sets(run_all, world_size, runs) == [["finished"] * len(runs)] * world_size


def curves_of(root: Path, names: Any) -> dict[str, Curve]:
    """Per case and logged step: the total, backbone and recycle losses and the gradient norm."""
    return {name: figures(root / name) for name in names}


def assert_equal(actual: Curve, reference: Curve) -> None:
    """Checks that losses and gradient norms of five steps agree to five digits."""
    assert len(actual) == len(reference) == 5
    for step, (left, right) in enumerate(zip(actual, reference, strict=True), start=1):
        assert left == pytest.approx(right, rel=1e-5), f"step {step}: {left} instead of {right}"


def assert_rounded(actual: Curve, reference: Curve) -> None:
    """Checks that losses and gradient norms of five steps agree within bf16's rounding."""
    assert len(actual) == len(reference) == 5
    for left, right in zip(actual, reference, strict=True):
        assert left[:-1] == pytest.approx(right[:-1], rel=2e-3)
        # a norm squares the rounding errors of every gradient, and tensor ranks also round each partial sum
        assert left[-1] == pytest.approx(right[-1], rel=5e-2)
