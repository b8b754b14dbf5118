"""Shapes of steps that are new: CUDA graphs are captured for them, which takes far longer than the step itself."""

from __future__ import annotations

import inspect
from collections.abc import Hashable

import pytest

from recycle_ds.inference.bench.parts import PARTS, time_by_part
from recycle_ds.inference.bench.serving import ServingSettings, measure
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.device.capture import Piece
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.parameters import SamplingParams
from tests.unit.inference.models import random_model


class Capturing:
    """Runs pieces as `GraphPieces` does: a new one twice, of which the second time is the capture."""

    def __init__(self) -> None:
        self.keys: set[Hashable] = set()
        self.is_capturing = False

    @property
    def first_runs(self) -> int:
        return len(self.keys)

    def run(self, key: Hashable, piece: Piece) -> None:
        piece()
        if key not in self.keys:
            self.keys.add(key)
            self.is_capturing = True
            piece()
            self.is_capturing = False


def _engine(batch: int = 1) -> tuple[DecodingEngine, Capturing]:
    engine = local_engine(random_model(7, 2, max_positions=96, std=0.3), max_batch=batch, steps="static")
    pieces = Capturing()
    engine._executor._runner._launch = pieces  # type: ignore[attr-defined]
    return engine, pieces


@pytest.mark.parametrize("mode", ["autoregressive", "verified"])
def test_steps_that_capture_teach_no_costs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a draft budget that switches drafts off because the first steps of every shape took a hundred times longer."""
    engine, pieces = _engine()
    engine.measure_costs()
    timed: list[int] = []
    monkeypatch.setattr(engine.scheduler.budget, "time", lambda *_: timed.append(pieces.first_runs))
    (answer,) = engine.add([1, 2, 3], SamplingParams(max_new_tokens=60), mode)
    new = 0
    while answer.ended_at is None:
        before, count = pieces.first_runs, len(timed)
        engine.step()
        new += pieces.first_runs > before
        assert pieces.first_runs == before or len(timed) == count
    assert new and (timed or mode == "autoregressive"), "the test needs both kinds of steps"


def test_time_by_part_is_measured_around_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents timers that wait for the device while a graph is captured, which ends the run, and a replay, in which no Python
    runs, that counts as the host's work."""
    engine, pieces = _engine()
    from recycle_ds.inference.bench import parts

    switch = parts._Stopwatch._switch

    def guarded(self: parts._Stopwatch) -> None:
        assert not pieces.is_capturing
        switch(self)

    monkeypatch.setattr(parts._Stopwatch, "_switch", guarded)
    found = time_by_part(engine, [[1, 2, 3]], "verified", SamplingParams(max_new_tokens=20, draft_tokens=2))
    assert pieces.keys and set(found) == {*PARTS, "total"}
    assert all(found[part] > 0 for part in ("full_call", "module", "sampling", "host"))
    assert engine._executor._runner._launch is pieces  # type: ignore[attr-defined]


def test_batches_are_timed_without_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a throughput that is mostly the time of capturing graphs."""
    engine, pieces = _engine(batch=4)
    from recycle_ds.inference.bench import serving

    seen: list[int] = []
    run = serving._run

    def counting(*arguments: object) -> None:
        before = pieces.first_runs
        run(*arguments)  # type: ignore[arg-type]
        seen.append(pieces.first_runs - before)

    monkeypatch.setattr(serving, "_run", counting)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    measure(engine, [[1, 2], [3]], ServingSettings((1, 4), ("autoregressive",), params, repeats=2))
    assert len(seen) == 6 and sum(seen[:2]) > 0 and seen[2:] == [0] * 4


def test_a_step_can_be_read_at_a_glance() -> None:
    """Prevents a step that grows until nobody sees that it is plan, run, apply."""
    body = inspect.getsource(DecodingEngine.step).splitlines()[2:]
    assert len(body) <= 15
