"""The engine on the GPU: many requests in little memory, in chunks, with shared prefixes, preempted and resumed."""

from __future__ import annotations

import random

from recycle_ds.inference.engine.build import BLOCK_SIZE, local_engine
from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.parameters import SamplingParams
from tests.gpu.models import decode, on_device

_PREFIX = [1, 2, 3, 1, 2, 0, 1, 2, 4, 1, 1, 2, 3, 0, 2, 2, 1, 0]


def _requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    draw = random.Random(5)
    prompts = [[*draw.choice(([], _PREFIX)), *draw.choices(range(8), k=draw.randint(1, 30))] for _ in range(count)]
    params = [
        SamplingParams(
            max_new_tokens=draw.randint(5, 40),
            temperature=draw.choice((0.0, 0.8)),
            seed=draw.randrange(1000),
            draft_tokens=draw.choice((None, 0, 1, 3)),
        )
        for _ in range(count)
    ]
    return prompts, params


def test_no_answer_depends_on_preemption() -> None:
    """Prevents a sequence that loses or mixes up its cache when it gives way to another and comes back."""
    prompts, params = _requests(24)
    model = on_device()
    memory = 14.5 * Cache.bytes_per_block(StageWeights(model), BLOCK_SIZE) / 2**30
    for mode in ("autoregressive", "verified"):
        engine = local_engine(model, max_batch=12, kv_memory_gib=memory)
        found = decode(engine, prompts, params, mode)
        assert engine.scheduler.preemptions > 0, "the test needs preemptions"
        roomy = local_engine(model, max_batch=2)
        alone = [decode(roomy, [prompt], [one], mode)[0] for prompt, one in zip(prompts, params, strict=True)]
        assert found == alone, mode
