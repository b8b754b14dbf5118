"""Conduct: clients that go away or read slowly, limits, keys, time limits, a server that loads, drains or breaks."""

from __future__ import annotations

import asyncio
import contextlib
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
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.serving.answers.answering import Answering, Task
from recycle_ds.serving.answers.tokens import TokenNames
from recycle_ds.serving.conduct.event_stream import EventStream, SlowReader, bounded, event
from recycle_ds.serving.process.listening import listen
from recycle_ds.serving.protocol.errors import ApiError
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


def head_of(path: str, length: int) -> bytes:
    """The head of a request with a body of so many bytes."""
    kind = "content-type: application/json\r\n"
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{kind}content-length: {length}\r\n\r\n".encode()


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


def test_connections_without_a_request_end(loaded: LoadedModel) -> None:
    """Prevents connections that send nothing, or a head that never ends, from staying open; streams must outlast the limit."""
    with serving(loaded, body_seconds=0.4, max_connections=3) as server:
        slow_down(server)
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for sent in (
            b"",
            b"GET /health HTTP/1.1\r\nhost: local",
            b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /he",
        ):
            with socket.create_connection(address, timeout=30) as connection:
                for byte in (sent[:-1], sent[-1:]):  # the last one comes when an earlier request has been answered
                    connection.sendall(byte)
                    time.sleep(0.05)
                data = b""
                while part := connection.recv(4096):
                    data += part
                assert data.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")
        stream = server.client().completions.create(model=NAME, prompt="the", max_tokens=60, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] is not None


def test_connections_are_limited(loaded: LoadedModel) -> None:
    """Prevents connections from using up all of the process's files."""
    with serving(loaded, max_connections=2, retry_after=7) as server, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for _ in range(2):
            stack.enter_context(socket.create_connection(address))
        until(lambda: len(server.http_server.server_state.connections) == 2)
        with socket.create_connection(address, timeout=30) as third:
            data = b""
            while part := third.recv(4096):
                data += part
            assert data.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: 7\r\n" in data
            assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        stack.close()
        until(lambda: not server.http_server.server_state.connections)
        assert server.http().get("/health").status_code == 200


def test_texts_that_cannot_fit_are_not_encoded(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents megabytes of text from being encoded for nothing, and texts that fit from being refused."""
    with serving(loaded, max_body_bytes=2**20) as server:
        http, names = server.http(), TokenNames(loaded.tokenizer)
        encoded: list[int] = []
        encode = Tokenizer.encode
        monkeypatch.setattr(
            Tokenizer,
            "encode",
            lambda self, text, **options: (encoded.append(len(text)), encode(self, text, **options))[1],
        )
        context = http.get("/v1/models").json()["data"][0]["max_model_len"]
        most = context * max(len(names.bytes_of(one)) for one in loaded.tokenizer.token_ids)
        assert http.post("/tokenize", json={"prompt": "a" * most}).status_code == 200 and encoded == [most]
        for path, body, param in (
            ("/tokenize", {"prompt": "a" * (most + 1)}, "prompt"),
            ("/v1/completions", {"prompt": "a" * (most + 1)}, "prompt"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * (most + 1)}]}, "messages"),
        ):
            error = http.post(path, json=body).json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert len(encoded) == 1


def test_every_body_needs_a_place(loaded: LoadedModel) -> None:
    """Prevents bodies and texts from being read without limit: the place is taken before the body comes."""
    with serving(loaded, max_requests=1) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        http = server.http()
        with socket.create_connection(address) as connection:
            connection.sendall(head_of("/tokenize", 50) + b"{")
            until(lambda: "recycle_requests_running 1.0" in http.get("/metrics").text)
            for path in ("/tokenize", "/detokenize", "/v1/completions", "/v1/chat/completions"):
                assert http.post(path, json={}).status_code == 429
        until(lambda: "recycle_requests_running 0.0" in http.get("/metrics").text)
        assert http.post("/tokenize", json={"prompt": "a"}).status_code == 200


def test_priority_is_limited(loaded: LoadedModel) -> None:
    """Prevents a client from starving all others: lower priorities run first."""
    for most in (0, 5):
        with serving(loaded, max_priority=most) as server:
            for priority, status in ((-most - 1, 400), (-most, 200), (1000, 200)):
                answer = server.http().post("/v1/completions", json={"prompt": "a", "priority": priority})
                assert answer.status_code == status
                assert status == 200 or answer.json()["error"]["param"] == "priority"


def test_no_redirects(server: Server) -> None:
    """Prevents a slash at the end from sending a client, with its key and prompt, to whatever host the request names."""
    found = server.http().post("/v1/completions/", json={"prompt": "a"})
    assert found.status_code == 404 and "location" not in found.headers


def test_probes_by_head(server: Server) -> None:
    """Prevents load balancers that probe with HEAD from taking the server for dead."""
    for path in ("/health", "/ready"):
        found = server.http().head(path)
        assert found.status_code == 200 and not found.content


def test_a_wrong_path_is_answered_with_the_right_one(server: Server) -> None:
    """Prevents a puzzle for those whose base_url lacks /v1."""
    for path, meant in (("/completions", "/v1/completions"), ("/v1/chat/completion", "/v1/chat/completions")):
        assert f"did you mean {meant}?" in server.http().post(path, json={}).json()["error"]["message"]
    assert "did you mean" not in server.http().get("/nothing/like/it").text


def test_probes_that_repeat_are_not_logged(loaded: LoadedModel) -> None:
    """Prevents probes of every second from filling the log, and a probe that begins to fail from missing in it."""
    with serving(loaded) as server:
        http = server.http()
        for _ in range(5):
            assert http.get("/ready").status_code == 200
        server.state.draining = True
        assert http.get("/ready").status_code == http.get("/ready").status_code == 503
        http.get("/nothing/last")
        until(lambda: any(line["path"] == "/nothing/last" for line in server.lines))
        assert [line["status"] for line in server.lines if line["path"] == "/ready"] == [503]
        server.state.draining = False


def test_the_client_in_the_log_is_the_connection(server: Server) -> None:
    """Prevents a client from choosing the address that is logged for it."""
    server.http().get("/nothing/forged", headers={"x-forwarded-for": "203.0.113.9", "x-forwarded-proto": "https"})
    until(lambda: any(line["path"] == "/nothing/forged" for line in server.lines))
    assert [line["client"] for line in server.lines if line["path"] == "/nothing/forged"] == ["127.0.0.1"]


def test_names_of_a_loopback_server(loaded: LoadedModel) -> None:
    """Prevents a web page whose name points to this machine (DNS rebinding) from using the server, and names that users do
    use from being refused."""
    with serving(loaded, allowed_hosts=("llm.example",)) as server:
        http = server.http()
        for name, status in (
            ("evil.example", 403),
            ("localhost.evil.example:80", 403),
            ("", 403),
            ("LLM.example:443", 200),
        ):
            found = http.get("/ready", headers={"host": name})
            assert found.status_code == status
            assert status == 200 or found.json()["error"]["code"] == "host_not_allowed"
        for name in ("localhost", "localhost:1234", "127.0.0.1", "[::1]:8000"):
            assert http.post("/v1/completions", json={"prompt": "a"}, headers={"host": name}).status_code == 200


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
        until(lambda: len(server.lines) == 2)
        with pytest.raises(openai.InternalServerError):  # not repeated: it would take as long again
            server.client().with_options(max_retries=2).completions.create(
                model=NAME, prompt="the", max_tokens=100, extra_body={"ignore_eos": True}
            )
        until(lambda: len(server.lines) >= 3)
        server.wait_idle()
        assert len(server.lines) == 3
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
        server.wait_idle()


def test_more_answers_than_the_server_ever_takes(loaded: LoadedModel) -> None:
    """Prevents clients from trying again for ever what can never be taken."""
    with serving(loaded, max_queued=1, engine={"max_batch": 2}) as server:
        client = server.client()
        for prompts, n, param in ((["a", "b"], 2, "prompt"), (["a"], 4, "n"), (["a", "b", "c", "d"], 1, "prompt")):
            with pytest.raises(openai.BadRequestError, match="at most 3") as found:
                client.completions.create(model=NAME, prompt=prompts, n=n)
            assert found.value.param == param
        assert len(client.completions.create(model=NAME, prompt=["a", "b", "c"], max_tokens=2).choices) == 3
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
            connection.sendall(head_of("/v1/completions", 50) + b"{")
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


@pytest.mark.parametrize(
    ("settings", "seen_by"),
    [({}, {"all"}), ({"api_keys": ("a-key",)}, {"key"}), ({"host": "0.0.0.0"}, set())],
)
def test_who_sees_why_the_engine_failed(loaded: LoadedModel, settings: dict[str, Any], seen_by: set[str]) -> None:
    """Prevents paths, hosts and memory of the machine from being shown to strangers, and clients that repeat a request that
    breaks the engine."""
    with serving(loaded, **settings) as server, httpx.Client(base_url=server.url, trust_env=False) as stranger:

        def fail() -> Any:
            raise RuntimeError("no memory at /secret")

        server.worker.engine.step = fail  # type: ignore[method-assign]
        http = server.http()
        answer = http.post("/v1/completions", json=LONG)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "failed"
        assert answer.headers["x-should-retry"] == "false"
        known = [answer, *(http.get(path) for path in ("/health", "/ready")), http.post("/v1/completions", json=LONG)]
        unknown = [stranger.get(path) for path in ("/health", "/ready")]
        assert [one.status_code for one in (*known[1:], *unknown)] == [503] * 5
        for found, visible in ((known, bool(seen_by)), (unknown, seen_by == {"all"})):
            assert {"secret" in one.text for one in found} == {visible}
            assert all("the engine failed" in one.text for one in found)


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
