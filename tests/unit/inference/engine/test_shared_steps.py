"""What sequences do to each other in a step: memory for drafts, the number of drafts, ends that nobody waits for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recycle_ds.inference import SamplingParams
from recycle_ds.inference.engine import build
from recycle_ds.inference.engine.executor import LocalExecutor
from recycle_ds.inference.engine.plan import Plan
from recycle_ds.inference.engine.sequence import Sequence
from tests.unit.inference.engine.invented_runner import sequence
from tests.unit.inference.models import random_model


def test_memory_for_a_chain_does_not_depend_on_what_was_drawn() -> None:
    """Prevents end tokens that come too often: a chain that drew one was short, found memory and was verified, while longer
    ones were dropped and drawn again."""
    ends = set()
    for drawn in (1, 2, 3):
        one = sequence(0, [1, 2, 3], 20, "verified", drafts=3)
        one.cached, one.ordered = 3, 3
        one.keep_drafts((5,) * drawn, (), (0.5,) * drawn, repeated=False)
        ids, parents = one.judge(range(1, drawn + 1))
        assert len(ids) == drawn
        ends.add(one.end_of_step(1 + drawn, parents, 3, 0))
    assert ends == {3 + 1 + 3 + 1 + 3}
    one.forget_drafts()
    assert one.end_of_step(1, (), 3, 0) == 3 + 1 + 1 + 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_that_requests_ask_for_share_a_step(temperature: float) -> None:
    """Prevents one request with many answers and drafts from making every step of the others take seconds; no text may
    depend on how many of its drafts are made."""
    model = random_model(6, 2, max_positions=96)
    params = SamplingParams(max_new_tokens=24, draft_tokens=16, temperature=temperature, seed=3, ignore_eos=True)
    alone = []
    for index in range(6):
        engine = build.local_engine(model, max_batch=1)
        alone.append(engine.add([1, index % 5], replace(params, draft_tokens=0), "verified")[0])
        engine.finish(alone[-1:])
    engine = build.local_engine(model, max_batch=6)
    engine.scheduler.chunk = 18
    plans: list[Plan] = []
    submit = engine._executor.submit

    def recorded(plan: Plan) -> None:
        plans.append(plan)
        submit(plan)

    engine._executor.submit = recorded  # type: ignore[method-assign]
    found = [engine.add([1, index % 5], params, "verified")[0] for index in range(6)]
    engine.finish(found)
    assert [one.tokens for one in found] == [one.tokens for one in alone]
    # of the first steps, drafts were made when fewer sequences ran
    crowded = [plan for plan in plans[2:] if len(plan.parts) == 6]
    assert max(sum(part.judged for part in plan.parts) for plan in crowded) == 18
    assert max(part.judged for plan in plans for part in plan.parts) > 3, "fewer sequences may make more"


class _ThreeAtOnce(LocalExecutor):
    depth = 3


def test_everyone_hears_of_sequences_that_end_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a server that for ever counts cancelled answers as open: with three steps under way, two of them ended where
    nobody looked."""
    monkeypatch.setattr(build, "LocalExecutor", _ThreeAtOnce)
    engine = build.local_engine(random_model(7, 1), max_batch=6)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    added = [engine.add([1, index], params, "autoregressive")[0] for index in range(6)]
    heard: list[Sequence] = []
    for _ in range(5):
        heard += engine.step()
    under_way = [one for one in added if one.in_flight]
    for one in added:
        engine.cancel(one)
    heard += engine.step()
    assert len(under_way) > 3 and sorted(one.number for one in heard) == [one.number for one in under_way]
    assert not engine.unfinished and all(one.ended_at is not None for one in added)
    # and of those that end when a request comes, which measures costs
    later = [engine.add([1, index], params, "autoregressive")[0] for index in range(3)]
    for _ in range(5):
        engine.step()
    under_way = [one for one in later if one.in_flight]
    for one in later:
        engine.cancel(one)
    last = engine.add([2, 2], replace(params, max_new_tokens=2), "verified")
    assert under_way and all(one.ended_at is not None for one in under_way)
    heard = []
    while engine.unfinished:
        heard += engine.step()
    assert set(heard) == {*under_way, *last}
