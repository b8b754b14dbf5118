"""The bench of batches: what it compares."""

from __future__ import annotations

import pytest

from recycle_ds.inference.bench.serving import ServingSettings, _Runs, measure
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.sequence import Sequence
from recycle_ds.inference.parameters import SamplingParams
from tests.unit.inference.models import random_model


def test_factors_are_those_of_runs_beside_each_other() -> None:
    """Prevents a machine that becomes faster between two repeats from being taken for a difference between modes."""
    first = _Runs(speeds=[100.0, 10.0, 50.0], first_tokens=[0.1], new_tokens=4, full_calls=4)
    other = _Runs(speeds=[200.0, 21.0, 95.0], first_tokens=[0.1], new_tokens=6, full_calls=4)
    assert first.figures(first)["factor"] == 1
    figures = other.figures(first)
    assert figures["factor"] == pytest.approx(2.0) and figures["tokens_per_second"] == 95
    assert figures["tokens_per_full_call"] == 1.5


def test_every_batch_and_mode_is_measured() -> None:
    """Prevents a batch size or mode that is left out or counted under another's name, and modes that are not run beside each
    other, when the order changes."""
    engine = local_engine(random_model(7, 2, max_positions=96, std=0.3), max_batch=3, compiled=False)
    settings = ServingSettings((1, 3), params=SamplingParams(max_new_tokens=6, ignore_eos=True), repeats=2)
    done: list[int] = []
    add, order = engine.add, list[tuple[int, str]]()

    def watched(prompt: list[int], params: SamplingParams, mode: str) -> list[Sequence]:
        if not order or order[-1] != (engine.scheduler.max_batch, mode):
            order.append((engine.scheduler.max_batch, mode))
        return add(prompt, params, mode)

    engine.add = watched  # type: ignore[method-assign, assignment]
    found = measure(engine, [[1, 2], [3, 4, 5]], settings, lambda count, total: done.append(count))
    assert list(found) == ["1", "3"] and done == list(range(1, 9)) and engine.scheduler.max_batch == 3
    first, other = "autoregressive", "verified"
    assert order[:4] == [(1, first), (1, other), (3, first), (3, other)]
    assert order[4:] in ([(3, first), (1, other), (1, first)], [(3, other), (3, first), (1, other), (1, first)])
    for modes in found.values():
        assert list(modes) == ["autoregressive", "verified"]
        assert modes["autoregressive"]["factor"] == 1 and modes["autoregressive"]["tokens_per_full_call"] == 1
        assert modes["verified"]["tokens_per_full_call"] >= 1 and modes["verified"]["factor"] > 0
