"""What the parity suites share: runs of a tiny model over several ranks, compared with the single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.parallel.ranks import run_all
from tests.runs import figures, tiny_run, zero

Change = dict[str, Any]
Curve = list[list[float]]

PIPELINE = zero(1).replace("zero1", "pipeline")


# Every run opens process groups, whose threads last as long as the process: many runs slow one another down.
RUNS_TOGETHER = 14


def run_cases(corpus: Path, root: Path, world_size: int, cases: dict[str, Change]) -> None:
    """Runs all cases, many in one set of processes; each leaves its metrics in root/name."""
    runs = [tiny_run(corpus, root / name, **change) for name, change in cases.items()]
    for first in range(0, len(runs), RUNS_TOGETHER):
        some = runs[first : first + RUNS_TOGETHER]
        endings = run_ranks(run_all, world_size, some, timeout=60 + 30 * len(some))
        assert endings == [["finished"] * len(some)] * world_size


def curves_of(root: Path, names: Any) -> dict[str, Curve]:
    """Per case and logged step: the total, backbone and recycle losses and the gradient norm."""
    return {name: figures(root / name) for name in names}


def assert_equal(mine: Curve, reference: Curve) -> None:
    """Five steps' losses and gradient norms to five digits."""
    assert len(mine) == len(reference) == 5
    for step, (left, right) in enumerate(zip(mine, reference, strict=True), start=1):
        assert left == pytest.approx(right, rel=1e-5), f"step {step}: {left} instead of {right}"


def assert_rounded(mine: Curve, reference: Curve) -> None:
    """The same within bf16's rounding."""
    assert len(mine) == len(reference) == 5
    for left, right in zip(mine, reference, strict=True):
        assert left[:-1] == pytest.approx(right[:-1], rel=2e-3)
        # a norm squares the roundings of every gradient, and tensor ranks round each partial sum once more
        assert left[-1] == pytest.approx(right[-1], rel=5e-2)
