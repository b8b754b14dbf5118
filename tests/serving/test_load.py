"""The server under load: many clients that read, sleep, leave, send nonsense and are refused, with little memory."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference.engine.build import BLOCK_SIZE
from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.sequence import Sequence
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.serving.accepted import Answer, Request
from recycle_ds.serving.answers.answering import Answering
from recycle_ds.serving.conduct.event_stream import EventStream
from recycle_ds.serving.streams import Channel, Stream
from tests.conftest import TEST_ALL
from tests.serving import soak
from tests.serving.clients import Client, Reply
from tests.serving.servers import Server, engine_of, serving, until

CLIENTS = 64
REQUESTS, QUESTIONS = (2000, 300) if TEST_ALL else (200, 40)
BLOCKS = 22  # of 16 positions: two of the longest answers, for a batch of eight
LIMITS = {"max_requests": 40, "max_queued": 40, "max_body_bytes": soak.BODY_LIMIT, "max_n": 4}
# What clients do, and how often.
CONDUCT = {
    "read": 55,
    "read slowly": 8,
    "sleep": 1,
    "leave in the body": 3,
    "leave after the request": 10,
    "leave in the stream": 10,
    "nonsense": 9,
    "too large": 4,
}
# Objects that live no longer than a request.
OF_REQUESTS = (Sequence, Request, Answer, Channel, Stream, Answering, EventStream)


@dataclass
class Outcome:
    """What clients have seen. statuses: of responses that were read. left: requests whose client went away or slept."""

    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0
    done: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    memory: list[float] = field(default_factory=list)


class Soak:
    """Runs clients against a server."""

    def __init__(self, server: Server, loaded: LoadedModel, found: list[soak.Question]) -> None:
        self._server, self._loaded, self._questions = server, loaded, found
        self._port = int(server.url.rpartition(":")[2])
        self.outcome = Outcome()
        self.sleeping: list[socket.socket] = []

    async def run(self, requests: int, seed: int) -> None:
        """All requests, by as many clients at once as there are."""
        source = random.Random(seed)
        counts, weights = list(CONDUCT), list(CONDUCT.values())
        kinds = [*counts, *source.choices(counts, weights, k=requests - len(counts))]  # each at least once
        left = iter(list(enumerate(kinds)))

        async def client() -> None:
            for number, kind in left:
                await self._act(kind, random.Random(f"{seed}/{number}"))
                self.outcome.done[kind] += 1
                if number % 100 == 99:
                    self.outcome.memory.append(resident_mib())

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def _act(self, kind: str, source: random.Random) -> None:
        client, question = Client(self._port, source), source.choice(self._questions)
        stream, details = source.random() < 0.5, source.random() < 0.5
        request = question.request(stream=stream, details=details)
        if kind.startswith("read"):
            asking = client.ask if kind == "read" else client.ask_slowly
            reply = await self._patiently(lambda: asking(request))
            assert reply.status == 200, (reply, question)
            self.outcome.tokens += question.check(self._loaded, reply, stream=stream, details=details)
        elif kind == "sleep":
            await self._sleep(client)
        elif kind.startswith("leave"):
            self.outcome.left += 1
            if kind == "leave in the stream":
                await client.leave(question.request(stream=True, details=details), "events")
            else:
                await client.leave(request, kind.split()[-1])
        else:
            content, status = source.choice(soak.NONSENSE if kind == "nonsense" else soak.TOO_LARGE)
            reply = await self._patiently(lambda: client.ask(content))
            assert reply.status == status, (reply, content[:300])
            error = json.loads(reply.body)["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]

    async def _patiently(self, ask: Any) -> Reply:
        """Asks again after as many seconds as a refusal says."""
        for _ in range(100):
            reply: Reply = await ask()
            self.outcome.statuses[reply.status] += 1
            if reply.status != 429:
                return reply
            await asyncio.sleep(int(reply.headers["retry-after"]))
        raise AssertionError("refused 100 times")

    async def _sleep(self, client: Client) -> None:
        """Sends a request that the server must give up. Keeps its connection open."""
        self.outcome.left += 1
        name = f"sleeper-{self.outcome.left}"
        lines = self._server.log
        ended = lambda: name in lines.getvalue()  # noqa: E731
        self.sleeping.append(await client.sleep(soak.sleepers_request(name), ended))


def resident_mib() -> float:
    """Memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def get(server: Server, path: str) -> httpx.Response:
    """A GET with a connection of its own."""
    return httpx.get(server.url + path, headers={"connection": "close"}, trust_env=False, timeout=60)


def metrics(server: Server) -> dict[str, float]:
    """All values of /metrics."""
    text = get(server, "/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.M) if name[0] != "#"}


def total(values: dict[str, float], name: str) -> float:
    """Sum over the labels."""
    return sum(value for key, value in values.items() if key.partition("{")[0] == name)


def alive() -> Counter[str]:
    """Objects of requests that are still referred to."""
    gc.collect()
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in OF_REQUESTS)


def test_many_clients_of_all_kinds(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a server that, after some hours of real clients, gives a wrong answer, has lost memory or places for requests,
    or is down: with preemption, reused prefixes, refusals, clients that leave at any moment, sleep, or send nonsense."""
    found = soak.questions(loaded, engine_of(loaded), QUESTIONS, seed=14)
    before = alive()
    engine = {
        "max_batch": 8,
        "kv_memory_gib": BLOCKS * Cache.bytes_per_block(StageWeights(loaded.model), BLOCK_SIZE) / 2**30,
    }
    with serving(loaded, engine=engine, send_buffer=4096, write_seconds=2, retry_after=1, **LIMITS) as server:
        assert server.worker.engine.scheduler.pool.count == BLOCKS
        load = Soak(server, loaded, found)
        asyncio.run(load.run(REQUESTS, seed=14))
        outcome = load.outcome
        server.wait_idle()
        until(lambda: metrics(server)["recycle_requests_running"] == 0)
        until(lambda: not server.http_server.server_state.connections)
        for connection in load.sleeping:
            connection.close()
        values, lines = metrics(server), server.lines
        check_counts(outcome, values, lines)
        assert get(server, "/ready").status_code == 200
        assert alive() == before, "objects of ended requests are still referred to"
        if TEST_ALL:  # allocations of the first requests are kept
            assert outcome.memory[-1] - outcome.memory[4] < 10, "memory grows with the number of requests"
        with capsys.disabled():
            print(
                f"\n{sum(outcome.done.values())} requests: {dict(outcome.done)}; statuses {dict(outcome.statuses)}; "
                f"{values['recycle_preemptions_total']:.0f} preemptions, {values['recycle_prefix_hit_tokens_total']:.0f} "
                f"positions from the cache, RSS {[round(one) for one in outcome.memory]} MiB"
            )


def check_counts(outcome: Outcome, values: dict[str, float], lines: list[dict[str, Any]]) -> None:
    """Asserts that metrics, log and clients agree, and that the load was what it should be."""
    by_status: Counter[int] = Counter()
    for name, value in values.items():
        if (
            name.startswith("recycle_requests_total")
            and 'route="/metrics"' not in name
            and 'route="/ready"' not in name
        ):
            by_status[int(re.findall(r'status="(\d+)"', name)[0])] += int(value)
    assert not [status for status in by_status if status >= 500], by_status
    for status in {*by_status, *outcome.statuses} - {200, 429, 499}:  # clients that left may have got these three
        assert by_status[status] == outcome.statuses[status], (status, by_status, outcome.statuses)
    extra = sum(by_status.values()) - sum(outcome.statuses.values())
    assert by_status[200] - outcome.statuses[200] >= 0 and by_status[429] - outcome.statuses[429] >= 0
    assert extra <= outcome.left, (by_status, outcome)
    ended = Counter(line["ended"] for line in lines if line["event"] == "request")
    assert total(values, "recycle_disconnects_total") == ended["disconnected"] + ended["slow_reader"]
    assert not [line for line in lines if line["event"] == "error"]
    answers = sum(line.get("answers", 0) for line in lines)
    assert answers == values["recycle_answers_finished_total"] + values["recycle_answers_cancelled_total"]
    assert values["recycle_answers_failed_total"] == 0
    assert outcome.tokens <= total(values, "recycle_completion_tokens_total") <= values["recycle_decoded_tokens_total"]
    for name in ("recycle_answers_running", "recycle_answers_waiting", "recycle_requests_running"):
        assert values[name] == 0, name
    assert values["recycle_kv_blocks_used"] == 0 and values["recycle_kv_blocks"] == BLOCKS
    assert total(values, "recycle_drafts_accepted_total") <= total(values, "recycle_drafts_verified_total")
    for name in ("recycle_preemptions_total", "recycle_prefix_hit_tokens_total", "recycle_answers_cancelled_total"):
        assert values[name] > 0, f"{name}: the test has no power"
    stopped = [line for line in lines if line.get("ended") == "disconnected" and line.get("completion_tokens")]
    assert len(stopped) > 3, "no client has left in the middle of an answer: the test has no power"
    assert outcome.statuses[429] > 0 and ended["slow_reader"] > 0 and ended["disconnected"] > 0, "the test has no power"
