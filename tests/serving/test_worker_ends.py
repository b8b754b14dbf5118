"""The end of a worker: an engine that fails, a rank that is lost, a server that drains or stops."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.serving.events import Delta, Failed
from recycle_ds.serving.refusals import Draining, EngineFailed
from recycle_ds.serving.worker import Worker
from tests.serving.workers import LONG, engine_of, read, running


def broken(engine: DecodingEngine, steps: int) -> None:
    """Lets a step fail."""
    submit = engine._executor.submit

    def failing(plan: Any) -> None:
        nonlocal steps
        steps -= 1
        if steps < 0:
            raise RuntimeError("the device is gone\nsecond line")
        submit(plan)

    engine._executor.submit = failing  # type: ignore[method-assign]


def test_an_exception_in_the_engine_fails_every_stream(caplog: pytest.LogCaptureFixture) -> None:
    """Prevents clients that wait for ever for an engine that is dead, and a server that calls itself alive."""
    worker = Worker(engine_of(max_batch=2))
    worker.engine.use_costs(worker.engine.scheduler.budget.costs)
    broken(worker.engine, 5)

    async def main() -> None:
        streams = [worker.submit([1, 2], LONG) for _ in range(4)]
        for stream in streams:
            _, ends, errors = await read(stream)
            assert not ends
            assert errors == [Failed("the engine failed: RuntimeError: the device is gone second line")]
        assert not worker.alive and worker.open == 0 and worker.statistics().failed == 4
        with pytest.raises(EngineFailed, match="the device is gone"):
            worker.submit([1, 2], LONG)

    worker.start()
    asyncio.run(main())
    assert worker.join(30)
    assert "Traceback" in caplog.text


def test_a_lost_rank_fails_every_stream_at_once() -> None:
    """Prevents clients that wait for a step that no rank will ever complete, and events that come after the error."""
    worker = Worker(engine_of(max_batch=2))
    entered, leave = threading.Event(), threading.Event()
    start = worker.engine._start_steps

    def hanging() -> Any:
        entered.set()
        assert leave.wait(30)
        return start()

    worker.engine._start_steps = hanging  # type: ignore[method-assign]

    async def main() -> None:
        streams = [worker.submit([1, 2], LONG) for _ in range(3)]
        assert await asyncio.to_thread(entered.wait, 30)
        late = worker.submit([1, 2], LONG)
        worker.give_up("rank 1 is lost")
        for stream in (*streams, late):
            assert await read(stream) == ({}, {}, [Failed("rank 1 is lost")])
        leave.set()
        assert not worker.alive
        with pytest.raises(EngineFailed, match="rank 1 is lost"):
            worker.submit([1, 2], LONG)

    worker.start()
    asyncio.run(main())
    worker.drain()


def test_drain_completes_what_was_accepted() -> None:
    """Prevents an accepted request from being lost at shutdown, and a new one from prolonging it."""
    worker = Worker(engine_of(max_batch=1))

    async def main() -> None:
        streams = [worker.submit([1, index], LONG) for index in range(3)]
        worker.drain()
        with pytest.raises(Draining):
            worker.submit([1, 2], LONG)
        for stream in streams:
            tokens, _, errors = await read(stream)
            assert len(tokens[0]) == 80 and not errors
        await asyncio.wait_for(worker.stopped(), 30)
        assert not worker.alive and worker.failure is None

    with running(worker):
        asyncio.run(main())


def test_stop_fails_what_cannot_be_completed() -> None:
    """Prevents a shutdown that takes as long as the longest answer, and clients without an error."""
    worker = Worker(engine_of(max_batch=1))

    async def main() -> None:
        streams = [worker.submit([1, index], LONG) for index in range(3)]
        assert isinstance(await anext(streams[0]), Delta)
        worker.stop("the server is shutting down")
        for stream in streams:
            _, ends, errors = await read(stream)
            assert errors == [Failed("the server is shutting down")] and not ends

    with running(worker):
        asyncio.run(main())
