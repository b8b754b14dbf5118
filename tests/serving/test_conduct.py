"""Conduct: clients that go away or read slowly, limits, keys, time limits, a server that loads, drains or breaks."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import openai
import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.serving.conduct.event_stream import EventStream, SlowReader, event
from recycle_ds.serving.process.listening import listen
from tests.serving.servers import NAME, TEXT, Server, serving, until
from tests.unit.inference.engine.requests import memory_of

LONG = {"prompt": TEXT[:10], "max_tokens": 100, "ignore_eos": True}


def slow_down(server: Server, seconds: float = 0.02) -> None:
    """Lets every step of the engine take longer, so that clients can act in the middle of an answer."""
    engine = server.worker.engine
    step = engine.step

    def slow() -> Any:
        time.sleep(seconds)
        return step()

    engine.step = slow  # type: ignore[method-assign]


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
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
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
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sleeper.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        answer = slow.client().completions.create(model=NAME, prompt="the", max_tokens=5)
        assert answer.usage is not None and answer.usage.completion_tokens > 0
        slow.wait_idle()


def test_a_reader_that_is_too_slow_is_dropped() -> None:
    """Prevents connections that stay open for ever because nobody reads them."""
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
            if sent > 3:
                await asyncio.sleep(60)  # as uvicorn does while the socket's buffer is full

        async def receive() -> Any:
            await asyncio.sleep(60)

        stream = EventStream(chunks(), keep_alive_seconds=5, write_seconds=0.05, on_end=results.append)
        await stream({"type": "http"}, receive, send)

    asyncio.run(serve())
    assert closed == [True] and [type(one) for one in results] == [SlowReader]


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


def test_answers_that_take_too_long_end(loaded: LoadedModel) -> None:
    """Prevents requests without end, and an error in the middle of a stream that looks like its end."""
    with serving(loaded, request_seconds=0.3) as server:
        slow_down(server, 0.05)
        found = server.http().post("/v1/completions", json=LONG)
        assert found.status_code == 504 and found.json()["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match=r"not complete after 0\.3 s"):
            list(
                server.client().completions.create(
                    model=NAME, prompt="the", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
                )
            )
        text = server.http().post("/v1/completions", json=LONG | {"stream": True}).text
        assert text.endswith("data: [DONE]\n\n") and '"code":"timeout"' in text
        server.wait_idle()


def test_more_requests_than_the_server_takes(loaded: LoadedModel) -> None:
    """Prevents a queue without limit, refusals that do not say when to try again, and refused requests that count for ever."""
    with serving(loaded, max_queued=0, max_requests=3, retry_after=7, engine={"max_batch": 2}) as server:
        slow_down(server)

        async def ask(client: httpx.AsyncClient, n: int) -> httpx.Response:
            return await client.post("/v1/completions", json=LONG | {"n": n, "max_tokens": 20})

        async def many() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
                return list(await asyncio.gather(*(ask(client, 1 + number % 2) for number in range(12))))

        answers = asyncio.run(many())
        refused = [one for one in answers if one.status_code == 429]
        assert refused and len(refused) < 12 and {one.status_code for one in answers} == {200, 429}
        assert all(one.headers["retry-after"] == "7" and one.json()["error"]["code"] == "queue_full" for one in refused)
        server.wait_idle()
        assert server.http().post("/v1/completions", json=LONG | {"n": 2}).status_code == 200
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model=NAME, prompt=["a", "b", "c"], max_tokens=50)
        server.wait_idle()


def test_bodies_have_limits(loaded: LoadedModel) -> None:
    """Prevents a body from filling the memory, declared or in chunks, or from never arriving, and requests of foreign web
    pages, which cannot declare JSON."""
    with serving(
        loaded, max_body_bytes=2000, body_seconds=0.3, max_prompt_tokens=50, max_new_tokens=30, max_n=2
    ) as server:
        http = server.http()
        big = {"prompt": "a" * 3000}
        declared = http.post("/v1/completions", json=big)
        chunked = http.post(
            "/v1/completions",
            content=iter([b"{", b" " * 1500, b" " * 1500]),
            headers={"content-type": "application/json"},
        )
        for found in (declared, chunked):
            assert found.status_code == 413 and found.json()["error"]["code"] == "body_too_large"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            found = http.post(
                "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind} if kind else {}
            )
            assert found.status_code == 415
        for body, param in (
            ({"prompt": "ab " * 60}, None),
            ({"prompt": "a", "max_tokens": 31}, "max_tokens"),
            ({"prompt": "a", "n": 3}, "n"),
            ({"prompt": ["a"] * 65}, "prompt"),
            ({"prompt": "a", "min_tokens": 31}, "min_tokens"),
        ):
            found = http.post("/v1/completions", json=body)
            assert found.status_code == 400 and found.json()["error"]["param"] == param
        assert (
            http.options("/v1/completions", headers={"origin": "http://x"}).headers.get("access-control-allow-origin")
            is None
        )


def test_limits_bound_defaults_too(loaded: LoadedModel) -> None:
    """Prevents requests that ask for nothing special from being refused because a limit is below a default."""
    with serving(loaded, max_new_tokens=5) as server:
        body: dict[str, Any] = {"ignore_eos": True}
        answer = server.http().post("/v1/completions", json=body | {"prompt": "a"}).json()
        chat = (
            server.http()
            .post("/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": "a"}]})
            .json()
        )
        assert answer["usage"]["completion_tokens"] == chat["usage"]["completion_tokens"] == 5
        body |= {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 6}
        assert server.http().post("/v1/chat/completions", json=body).json()["error"]["param"] == "max_completion_tokens"
    with serving(loaded, engine={"kv_memory_gib": memory_of(loaded.model, 3)}) as small:
        # three blocks: 48 positions, one block and one position are kept for the next step
        assert (
            small.http()
            .post("/v1/completions", json={"prompt": [7] * 25, "ignore_eos": True})
            .json()["usage"]["completion_tokens"]
            == 31 - 25
        )
        refused = small.http().post("/v1/completions", json={"prompt": [7] * 25, "max_tokens": 7})
        assert refused.status_code == 400 and "room for 6 tokens" in refused.json()["error"]["message"]
        assert small.http().post("/v1/completions", json={"prompt": [7] * 31}).status_code == 400


def test_keys(loaded: LoadedModel) -> None:
    """Prevents access without a valid key, probes that need one, and keys in the log."""
    with serving(loaded, api_keys=("first-key", "second-key")) as server:
        with httpx.Client(base_url=server.url, trust_env=False) as http:
            for path in ("/v1/models", "/metrics", "/openapi.json", "/run.json", "/static", "/nothing"):
                assert http.get(path).status_code == 401, path
            for given in (
                "Bearer",
                "Bearer first-ke",
                "Basic first-key",
                "first-key",
                "Bearer \u00e9",
                "Bearer first-key2",
            ):
                answer = http.get("/v1/models", headers={"authorization": given.encode()})
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            for key in ("first-key", "second-key"):
                assert http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
            assert [http.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
        with pytest.raises(openai.AuthenticationError):
            server.client().with_options(api_key="wrong").models.list()
        assert "-key" not in server.log.getvalue()


def test_a_server_that_loads_drains_or_is_broken(loaded: LoadedModel) -> None:
    """Prevents requests that hang before the model is loaded, that are taken while draining, or that wait for a broken engine;
    running ones must end in each case."""
    with serving(None) as loading:
        http = loading.http()
        assert http.get("/health").status_code == 200
        for found in (http.get("/ready"), http.post("/v1/completions", json=LONG), http.get("/v1/models")):
            assert (
                found.status_code == 503 and found.json()["error"]["code"] == "loading" and found.headers["retry-after"]
            )
        assert "recycle_ready 0.0" in http.get("/metrics").text
        loading.state.failure = "rank 1 is lost"
        assert http.get("/health").status_code == 503 and "rank 1 is lost" in http.get("/ready").text
    with serving(loaded) as server:
        slow_down(server)
        http, stream = (
            server.http(),
            server.client().completions.create(model=NAME, prompt="the", max_tokens=30, stream=True),
        )
        first = next(iter(stream))
        server.state.draining = True
        server.worker.drain()
        for found in (http.get("/ready"), http.post("/v1/completions", json=LONG)):
            assert found.status_code == 503 and found.json()["error"]["code"] == "draining"
        assert http.get("/health").status_code == 200
        assert first.choices and [chunk.choices[0].finish_reason for chunk in stream][-1] is not None
    with serving(loaded) as broken:
        slow_down(broken)
        http, stream = (
            broken.http(),
            broken.client().completions.create(model=NAME, prompt="the", max_tokens=90, stream=True),
        )
        next(iter(stream))

        def fail() -> Any:
            raise RuntimeError("no memory")

        broken.worker.engine.step = fail  # type: ignore[method-assign]
        with pytest.raises(openai.APIError, match="the engine failed: RuntimeError: no memory"):
            list(stream)
        assert http.get("/health").status_code == 503 and http.post("/v1/completions", json=LONG).status_code == 503


def test_logs_and_ids(server: Server) -> None:
    """Prevents requests that cannot be found in the log, ids that break its lines, and texts of users in it."""
    http, secret = server.http(), "a secret \ud558\ub298"
    answer = http.post("/v1/completions", json={"prompt": secret, "max_tokens": 3}, headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    for given in ('x"\\', "a b", "y" * 200, ""):
        made = http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
        assert re.fullmatch(r"req-[0-9a-f]{24}", made)
    http.post("/v1/completions", json={"prompt": secret, "unknown": secret})
    until(lambda: server.lines[-1]["status"] == 400)
    (line,) = [one for one in server.lines if one["request_id"] == "abc-1"]
    assert (line["status"], line["path"], line["ended"], line["mode"]) == (
        200,
        "/v1/completions",
        "complete",
        "verified",
    )
    assert line["completion_tokens"] == 3 and line["prompt_tokens"] > 3 and line["time_to_first_token"] > 0
    assert server.lines[-1]["error"] == "unknown_parameter"
    assert "secret" not in server.log.getvalue() and "\\ud558" not in server.log.getvalue()


def test_metrics_count_what_was_served(loaded: LoadedModel) -> None:
    """Prevents metrics that stay at zero, that are shared between applications, or that grow with every path asked for."""
    with serving(loaded) as server:
        http = server.http()
        body = {"prompt": TEXT[:10], "max_tokens": 40, "temperature": 0, "draft_tokens": 2}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        http.post("/v1/completions", json=body | {"prompt": "", "n": 0})
        for number in range(5):
            http.get(f"/nothing/{number}")
        until(lambda: 'route="other",status="404"} 5.0' in http.get("/metrics").text)
        text = http.get("/metrics").text
        values = {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.M) if name[0] != "#"}
        assert values['recycle_requests_total{route="/v1/completions",status="200"}'] == 1
        assert values['recycle_requests_total{route="/v1/completions",status="400"}'] == 1
        assert values["recycle_prompt_tokens_total"] == usage["prompt_tokens"]
        sources = [
            values[f'recycle_completion_tokens_total{{mode="verified",source="{name}"}}']
            for name in ("full", "recycled")
        ]
        assert sum(sources) == usage["completion_tokens"] == values["recycle_decoded_tokens_total"] and min(sources) > 0
        accepted = usage["completion_tokens_details"]["accepted_prediction_tokens"]
        by_position = [values[name] for name in values if name.startswith("recycle_drafts_accepted_total")]
        assert sum(by_position) == accepted == values['recycle_context_drafts_accepted_total{up_to="256"}']
        for name in (
            "time_to_first_token_seconds",
            "time_per_output_token_seconds",
            "request_seconds",
            "tokens_per_full_call",
        ):
            assert (
                values[f'recycle_{name}_count{{mode="verified"}}'] == 1
                and values[f'recycle_{name}_sum{{mode="verified"}}'] > 0
            )
        assert (
            values["recycle_ready"] == 1 and values["recycle_kv_blocks"] > 0 and values["recycle_answers_running"] == 0
        )
