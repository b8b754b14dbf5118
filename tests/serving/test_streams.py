"""Answers on their way: clients that go away, read slowly or wait, and events that are sent at once."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import openai
import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.serving.answers.answering import Answering, Task
from recycle_ds.serving.conduct.event_stream import EventStream, SlowReader, bounded, event
from recycle_ds.serving.process.listening import listen
from recycle_ds.serving.protocol.errors import ApiError
from tests.serving.servers import LONG, NAME, Server, head_of, serving, slow_down, until


@pytest.fixture(scope="module")
def slow(loaded: LoadedModel) -> Iterator[Server]:
    with serving(loaded) as server:
        slow_down(server)
        yield server
        server.wait_idle()


def ended(server: Server, how: str) -> list[dict[str, Any]]:
    return [line for line in server.lines if line.get("ended") == how]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_goes_away_ends_its_generation(slow: Server, stream: bool, path: str) -> None:
    """Prevents generation that goes on for nobody (sglang#37833, vllm#54947): Starlette cancels no complete answers."""
    before, tokens = len(ended(slow, "disconnected")), slow.worker.statistics().new_tokens
    body = LONG | {"stream": stream, "n": 2}
    if "chat" in path:
        body = {name: value for name, value in body.items() if name != "prompt"}
        body["messages"] = [{"role": "user", "content": "hi"}]
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", int(slow.url.rpartition(":")[2]))) as connection:
        connection.sendall(head_of(path, len(content)) + content)
        until(lambda: slow.worker.statistics().new_tokens > tokens + 2)
    slow.wait_idle()
    until(lambda: len(ended(slow, "disconnected")) == before + 1)
    assert slow.worker.statistics().new_tokens < tokens + 60, "the answer was decoded to its end"
    line = ended(slow, "disconnected")[-1]
    assert 0 < line["completion_tokens"] < 100 and line["status"] == (200 if stream else 499)


def test_the_official_client_cancels(slow: Server) -> None:
    """Prevents blocks that stay occupied when a client closes its stream, or gives up waiting."""
    client = slow.client()
    stream = client.completions.create(
        model=NAME, prompt="the", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    slow.wait_idle()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(
            model=NAME, prompt="the", max_tokens=100, extra_body={"ignore_eos": True}
        )
    slow.wait_idle()


def test_a_client_that_does_not_read_holds_nobody_up(slow: Server) -> None:
    """Prevents a reader that sleeps from stopping the engine, other clients, or its own blocks from being freed."""
    content = json.dumps(LONG | {"stream": True, "token_details": True, "n": 4}).encode()
    with socket.socket() as sleeper:
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sleeper.connect(("127.0.0.1", int(slow.url.rpartition(":")[2])))
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        sleeper.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        answer = slow.client().completions.create(model=NAME, prompt="the", max_tokens=5)
        assert answer.usage is not None and answer.usage.completion_tokens > 0
        slow.wait_idle()


@pytest.mark.parametrize("read", [0, 3])
def test_a_reader_that_is_too_slow_is_dropped(read: int) -> None:
    """Prevents connections that stay open for ever because nobody reads them. read: messages, with the response's start."""
    closed, results = [], []

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        try:
            while True:
                yield {"text": "x"}
        finally:
            closed.append(True)

    async def serve() -> None:
        sent = 0

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent > read:
                await asyncio.sleep(60)  # as uvicorn does while the socket's buffer is full

        async def receive() -> Any:
            await asyncio.sleep(60)

        stream = EventStream(chunks(), keep_alive_seconds=5, on_end=results.append)
        await stream({"type": "http"}, receive, bounded(send, 0.05))

    asyncio.run(serve())
    assert [type(one) for one in results] == [SlowReader] and closed == ([True] if read else [])


def test_a_response_that_cannot_start_holds_no_place(loaded: LoadedModel) -> None:
    """Prevents a client that reads nothing from keeping a request's place, its answer or its connection for ever: its
    responses to earlier requests fill the connection, and the last one cannot even begin."""
    large = json.dumps(LONG | {"n": 16, "logprobs": 10, "max_tokens": 30}).encode()
    stream = json.dumps(LONG | {"stream": True}).encode()
    path = "/v1/completions"
    with serving(loaded, send_buffer=4096, write_seconds=0.3, max_requests=1) as server, socket.socket() as sleeper:
        sent = server.http().post(path, content=large, headers={"content-type": "application/json"})
        assert len(sent.content) > 100_000, "fits into the buffers: the test has no power"
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sleeper.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        sleeper.sendall(head_of(path, len(large)) + large + head_of(path, len(stream)) + stream)
        until(lambda: ended(server, "slow_reader") != [])
        assert [line["ended"] for line in server.lines] == ["complete", "complete", "slow_reader"]
        server.wait_idle()
        assert server.http().post(path, json=LONG).status_code == 200
        server.clients[-1].close()
        server.clients[0].close()
        until(lambda: not server.http_server.server_state.connections)


def test_the_time_for_an_answer_begins_with_it(loaded: LoadedModel) -> None:
    """Prevents answers whose time never begins because nobody reads them."""
    with serving(loaded) as server:
        slow_down(server, 0.05)
        task = Task([[1, 2, 3]], SamplingParams(max_new_tokens=100, ignore_eos=True), "verified", seconds=0.2)

        async def ask() -> None:
            answering = Answering(server.worker, loaded.tokenizer, task)
            while server.worker.open:
                await asyncio.sleep(0.01)
            with pytest.raises(ApiError, match=r"not complete after 0\.2 s"):
                async for _ in answering.steps():
                    pass

        asyncio.run(ask())
        server.wait_idle()


def test_a_complete_answer_is_not_late(loaded: LoadedModel) -> None:
    """Prevents an error in place of the usage where a client takes its time with the last piece of a complete answer."""
    with serving(loaded) as server:
        task = Task([[1, 2, 3]], SamplingParams(max_new_tokens=5, ignore_eos=True), "verified", seconds=1.0)

        async def ask() -> list[str | None]:
            reasons = []
            async for step in Answering(server.worker, loaded.tokenizer, task).steps():
                reasons.append(step.reason)
                if step.reason is not None:
                    await asyncio.sleep(1.5)
            return reasons

        assert asyncio.run(ask())[-1] == "length"
        server.wait_idle()


def test_tokens_are_sent_at_once() -> None:
    """Prevents a delay of some 40 ms for every token: asyncio turns Nagle's algorithm off only for sockets that name TCP as
    their protocol, and sockets are made without it by default."""

    class Kept(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connection = transport.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    async def connect() -> int:
        nonlocal found
        found = asyncio.get_running_loop().create_future()
        listener = listen("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(Kept, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            try:
                return await found
            finally:
                writer.close()

    found: asyncio.Future[int]
    assert asyncio.run(connect()) != 0


def test_events_are_one_line_for_every_client() -> None:
    """Prevents text with Unicode's line ends from being split by clients that split at them."""
    text = "a\u2028b\u2029c\x85d\r\ne\x0bf \U0001f642"
    (line, *rest) = event({"text": text}).decode().splitlines()
    assert rest == [""] and json.loads(line.removeprefix("data: ")) == {"text": text}


def test_streams_stay_open_while_nothing_comes(loaded: LoadedModel) -> None:
    """Prevents proxies from closing streams that wait in the queue, and comments that clients take for events."""
    with serving(loaded, keep_alive_seconds=0.02) as server:
        slow_down(server, 0.1)
        body = {"prompt": "the", "max_tokens": 3, "stream": True}
        assert server.http().post("/v1/completions", json=body).text.count(": waiting\n\n") > 2
        assert len(list(server.client().completions.create(model=NAME, prompt="the", max_tokens=3, stream=True))) > 1
