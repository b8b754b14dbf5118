"""The benches of `make gpu`, at a size for a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from recycle_ds.gpu_check.training_benches import compared
from tests.distributed import run_ranks


class _Ended(Exception):
    pass


def _first_figures(rank: int, world_size: int) -> dict[str, Any]:
    """What has been written when the bench is ended after its first round."""
    written: list[dict[str, Any]] = []

    def write(figures: dict[str, Any]) -> None:
        written.append(figures)
        raise _Ended

    with pytest.raises(_Ended):
        compared(write, small=True)
    return written[0]


def test_a_bench_that_is_ended_leaves_its_rounds() -> None:
    """Prevents a time limit in the last round from taking all of training's figures with it."""
    (found,) = run_ranks(_first_figures, 1, timeout=200)
    assert {len(seconds) for seconds in found["seconds_per_step"].values()} == {1}
    assert found["ratios"]["speed_over_huggingface"] > 0
    assert all(one["tokens_per_second"] > 0 for one in found["subjects"].values())
