"""What the tests of the worker share: an engine, a worker that runs, and readers of its streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from recycle_ds.inference import SamplingParams
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.serving.events import Delta, Failed, Finished, TokenEvent
from recycle_ds.serving.streams import Stream
from recycle_ds.serving.worker import Worker
from tests.unit.inference.models import random_model

LONG = SamplingParams(max_new_tokens=80, draft_tokens=2)


def engine_of(**options: Any) -> DecodingEngine:
    """An engine on a small random model with a module."""
    return local_engine(random_model(7, 1, max_positions=96, std=0.3), **options)


@contextmanager
def running(worker: Worker) -> Iterator[Worker]:
    """Starts a worker, and checks at the end that it has given back every block."""
    worker.start()
    try:
        yield worker
    finally:
        worker.stop("the test has ended")
        assert worker.join(30), "the engine's thread does not end"
    assert worker.open == 0
    worker.engine.scheduler.check()
    assert not worker.engine.unfinished
    assert worker.engine.scheduler.pool.free == worker.engine.scheduler.pool.count


async def read(stream: Stream) -> tuple[dict[int, list[TokenEvent]], dict[int, Finished], list[Failed]]:
    """Tokens and ends by index, and errors."""
    tokens: dict[int, list[TokenEvent]] = {}
    ends: dict[int, Finished] = {}
    errors = []
    async for event in stream:
        if isinstance(event, Delta):
            assert event.tokens and event.index not in ends
            tokens.setdefault(event.index, []).extend(event.tokens)
        elif isinstance(event, Finished):
            ends[event.index] = event
        else:
            errors.append(event)
    return tokens, ends, errors


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits until a condition holds, while the event loop runs."""

    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), seconds)
