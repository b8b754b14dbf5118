"""The worker: requests of many readers on one engine."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from recycle_ds.inference import DecodingError, Generation, SamplingParams
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.parameters import MODES
from recycle_ds.serving.events import Delta
from recycle_ds.serving.refusals import QueueFull
from recycle_ds.serving.worker import Worker
from tests.serving.workers import LONG, engine_of, read, running, until
from tests.unit.inference.engine.requests import Asked, decode_alone, memory_of, requests
from tests.unit.inference.models import random_model


def test_streams_are_the_engines_answers() -> None:
    """Prevents a stream that loses, repeats or reorders tokens of any mode, and a batch that changes an answer."""
    model = random_model(7, 1, max_positions=96, std=0.3)
    asked = [one for one in requests(40, 7, seed=3) if one.cancelled_after is None]
    assert {one.mode for one in asked} == set(MODES)
    expected = decode_alone(model, asked, eos=6)
    engine = local_engine(model, max_batch=8, kv_memory_gib=memory_of(model, 12), eos_ids=(6,))
    worker = Worker(engine)

    async def ask(one: Asked, answer: Generation) -> int:
        stream = worker.submit(one.prompt, one.params, one.mode, priority=one.priority, rejected=True)
        tokens, ends, errors = await read(stream)
        generation = ends[0].generation
        assert not errors and generation.token_ids == answer.token_ids, one
        found = tokens[0]
        assert tuple(token.token_id for token in found) == answer.token_ids
        assert tuple(token.recycled for token in found) == generation.recycled
        if one.params.logprobs is None:
            assert all(token.logprob is None and token.top == () for token in found)
        else:
            assert tuple((token.logprob, token.top) for token in found) == generation.logprobs
        return sum(len(token.rejected) for token in found)

    async def main() -> list[int]:
        return await asyncio.gather(*(ask(one, answer) for one, answer in zip(asked, expected, strict=True)))

    with running(worker):
        rejected = sum(asyncio.run(main()))
        statistics = worker.statistics()
    assert rejected > 20
    assert engine.scheduler.preemptions == statistics.preemptions > 0, "the test needs preemptions"
    assert statistics.finished == len(asked) and statistics.cancelled == statistics.failed == 0
    assert statistics.new_tokens == sum(len(answer.token_ids) for answer in expected)
    _, tested, accepted = statistics.acceptance_by_context[0]
    assert tested > accepted > 10 and statistics.reused_tokens > 50


def test_rejected_drafts_are_those_that_the_tokens_replaced() -> None:
    """Prevents drafts that are shown at a wrong place, are missing, or were never verified."""
    engine = engine_of(max_batch=1)
    (sequence,) = engine.add([1, 2], SamplingParams(max_new_tokens=40, draft_tokens=3), "verified")
    sequence.rejected = {}
    expected: dict[int, tuple[int, ...]] = {}
    while sequence.ended_at is None:
        known, drafts, tested = len(sequence.tokens), sequence.drafts, list(sequence.tally.drafted)
        engine.step()
        new = sequence.tokens[known:]
        judged = sum(sequence.tally.drafted) - sum(tested)
        if len(new) <= judged:
            assert tuple(new[:-1]) == drafts[: len(new) - 1] and new[-1] != drafts[len(new) - 1]
            expected[known - 2 + len(new) - 1] = drafts[len(new) - 1 : judged]
    assert len(expected) > 5 and sequence.rejected == expected
    (other,) = engine.add([1, 2], SamplingParams(max_new_tokens=40, draft_tokens=3), "verified")
    engine.finish([other])
    assert other.rejected is None


def test_several_answers_to_one_request() -> None:
    """Prevents answers of one request from being mixed up, and a stream that ends with the first of them."""
    worker = Worker(engine_of(max_batch=2))
    params = SamplingParams(n=3, temperature=1.2, seed=40, max_new_tokens=20)
    expected = [
        decode_alone(random_model(7, 1, max_positions=96, std=0.3), [Asked([1, 2, 3] * 9, one, "verified", 0, 0)])[0]
        for one in (SamplingParams(temperature=1.2, seed=40 + index, max_new_tokens=20) for index in range(3))
    ]

    async def main() -> None:
        tokens, ends, errors = await read(worker.submit([1, 2, 3] * 9, params))
        assert not errors
        for index, answer in enumerate(expected):
            assert tuple(token.token_id for token in tokens[index]) == answer.token_ids
            assert ends[index].generation.token_ids == answer.token_ids
        assert ends[1].cached_tokens == 26 and ends[0].cached_tokens == 0

    with running(worker):
        asyncio.run(main())


def test_a_cancelled_request_frees_its_blocks() -> None:
    """Prevents a client that went away from holding memory: before its request begins, in the middle, and when nobody
    holds its stream any more."""
    worker = Worker(engine_of(max_batch=2))
    pool = worker.engine.scheduler.pool

    async def main() -> None:
        streams = [worker.submit([index, 2], LONG) for index in range(6)]  # four of them wait
        async for event in streams[0]:
            assert isinstance(event, Delta)
            break
        for stream in streams[:3]:
            stream.cancel()
            stream.cancel()
        assert [event async for event in streams[0]] == []
        reader = asyncio.create_task(read(streams[3]))
        await asyncio.sleep(0)
        streams[3].cancel()
        assert (await reader)[1] == {}
        del streams[4], stream
        gc.collect()
        tokens, ends, _ = await read(streams[4])
        assert len(tokens[0]) == len(ends[0].generation.token_ids) == 80
        await until(lambda: worker.open == 0)
        assert pool.free == pool.count

    with running(worker):
        asyncio.run(main())
        found = worker.statistics()
        assert (found.finished, found.cancelled, found.waiting, found.running, found.blocks_used) == (1, 5, 0, 0, 0)


def test_a_request_cancelled_before_the_engine_sees_it() -> None:
    """Prevents a request that is gone already from being decoded, or from counting for ever against the limit."""
    worker = Worker(engine_of(max_batch=1), max_queued=0)

    async def main() -> None:
        stream = worker.submit([1, 2], LONG)
        with pytest.raises(QueueFull, match="1 answers are being decoded or wait, of at most 1"):
            worker.submit([1, 3], LONG)
        await stream.aclose()
        worker.start()
        await until(lambda: worker.open == 0)
        _, ends, _ = await read(worker.submit([1, 3], LONG))
        assert list(ends) == [0]

    asyncio.run(main())
    assert worker.engine.scheduler.step < 100, "the cancelled request was decoded"
    worker.drain()
    assert worker.join(30)


def test_a_reader_that_does_not_read_holds_up_nobody() -> None:
    """Prevents a slow client from stopping others, and events that pile up for it one by one."""
    worker = Worker(engine_of(max_batch=4))

    async def main() -> None:
        slow = worker.submit([1, 2], LONG)
        for prompt in range(3):
            await read(worker.submit([prompt], LONG))
        await until(lambda: worker.open == 0)
        await asyncio.sleep(0.05)
        events = [event async for event in slow]
        assert len(events) == 2 and isinstance(events[0], Delta) and len(events[0].tokens) == 80

    with running(worker):
        asyncio.run(main())


def test_requests_are_refused_at_once() -> None:
    """Prevents a bad request from reaching the engine's thread, and a queue without a bound."""
    worker = Worker(engine_of(max_batch=2), max_queued=1)

    async def main() -> None:
        with pytest.raises(DecodingError, match="outside the model's vocabulary"):
            worker.submit([99], LONG)
        with pytest.raises(DecodingError, match="n=4: this server decodes and queues at most 3 answers"):
            worker.submit([1], SamplingParams(n=4))
        kept = [worker.submit([1], LONG), worker.submit([2], SamplingParams(n=2, temperature=1))]
        with pytest.raises(QueueFull):
            worker.submit([1], LONG)
        assert worker.statistics().waiting == 3
        kept[1].cancel()

    with running(worker):
        asyncio.run(main())


def test_a_loop_that_is_closed_does_not_break_the_engine() -> None:
    """Prevents a reader that dies with its event loop from taking the engine with it."""
    worker = Worker(engine_of(max_batch=2))
    kept = []

    async def leave() -> None:
        kept.append(worker.submit([1, 2], LONG))

    async def stay() -> None:
        tokens, _, _ = await read(worker.submit([1, 3], LONG))
        assert len(tokens[0]) == 80

    with running(worker):
        asyncio.run(leave())
        asyncio.run(stay())


def test_an_idle_worker_sleeps() -> None:
    """Prevents a thread that polls while there is nothing to do, and one that does not wake up for a request."""
    worker = Worker(engine_of(max_batch=2), keep_alive=3600)
    calls = threading.Event()
    worker.engine.keep_alive = calls.set  # type: ignore[method-assign]

    async def main() -> None:
        taken = worker.engine.scheduler.step
        await asyncio.sleep(0.2)
        assert worker.engine.scheduler.step == taken
        await read(worker.submit([1, 3], LONG))

    with running(worker):
        asyncio.run(main())
    assert not calls.is_set()
    worker = Worker(engine_of(max_batch=2), keep_alive=0.01)
    worker.engine.keep_alive = calls.set  # type: ignore[method-assign]
    with running(worker):
        assert calls.wait(30), "ranks that wait are not told to go on waiting"
