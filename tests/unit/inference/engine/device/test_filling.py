"""The fields of a step do not depend on the steps that were written into the same buffers before."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from recycle_ds.inference import SamplingParams
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.device import fields
from recycle_ds.inference.engine.device.buffers import Inbox
from recycle_ds.inference.engine.device.filling import Filled, Filling
from recycle_ds.inference.engine.plan import Plan, Rules
from tests.unit.inference.models import random_model

_ROWS = dict.fromkeys(fields.OF_ROWS, "rows") | dict.fromkeys(fields.OF_CHOICES, "choices")
_ROWS |= dict.fromkeys(fields.OF_READS, "reads")


def test_fields_are_those_of_an_unused_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents what an earlier step left from being read: block tables of sequences that ended, drafts, sampling parameters
    of the request that had this place before."""
    compared = np.zeros(3, dtype=int)
    original = Filling.fill

    def fill(self: Filling, plan: Plan, rules: Mapping[int, Rules], places: Sequence[int]) -> Filled:
        found = original(self, plan, rules, places)
        width = self._tables.shape[2]
        inbox = Inbox(fields.fields(width), torch.device("cpu"))
        fresh = original(Filling(inbox, self._size, self._scratch), plan, rules, places)
        assert (found.shape, found.flat, found.long_reads) == (fresh.shape, fresh.flat, fresh.long_reads)
        for name, numbers in inbox.host.items():
            size = len(plan.moves) if name.startswith("moves") else getattr(found.shape, _ROWS.get(name, "sequences"))
            assert np.array_equal(self._host[name][:size], numbers[:size]), name
        compared[:] += 1, len(plan.parts), sum(part.judged for part in plan.parts)
        return found

    monkeypatch.setattr(Filling, "fill", fill)
    draw = random.Random(4)
    engine = local_engine(random_model(8, 3), max_batch=5, kv_memory_gib=1e-4, eos_ids=(1,), steps="static")
    for number in range(24):
        sampled = draw.random() < 0.5
        params = SamplingParams(
            max_new_tokens=draw.randrange(1, 25),
            temperature=sampled * draw.choice((0.7, 1.3)),
            top_k=draw.choice((0, 3)),
            seed=number,
            draft_tokens=draw.choice((None, None, 3)),
            min_new_tokens=draw.choice((0, 4)),
            repetition_penalty=draw.choice((1.0, 1.2)),
            logit_bias={2: 0.5} if number % 3 else {},
        )
        engine.add(
            [draw.randrange(8) for _ in range(draw.randrange(1, 20))],
            params,
            draw.choice(("autoregressive", "verified")),
        )
        for _ in range(draw.randrange(4)):
            engine.step()
    while engine.unfinished:
        engine.step()
    assert (compared > 50).all()
