"""Limits of a server: connections, bodies, prompts, answers, requests at the same time, priorities and time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.serving.answers.tokens import TokenNames
from tests.serving.servers import LONG, NAME, head_of, serving, slow_down, until
from tests.unit.inference.engine.requests import memory_of


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


def test_a_client_that_goes_away_behind_a_further_request(loaded: LoadedModel) -> None:
    """Prevents an answer from being decoded to its end for nobody: the end of a connection was not seen while a second request
    lay in it."""
    body = json.dumps({"prompt": "a", "max_tokens": 100, "ignore_eos": True}).encode()
    with serving(loaded) as server:
        slow_down(server)
        request = head_of("/v1/completions", len(body)) + body
        for parts in ((request + request,), (request, request), (request, request[:40])):
            before = server.worker.statistics().cancelled
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
                for part in parts:
                    connection.sendall(part)
                    until(lambda: server.worker.statistics().running == 1)
            until(lambda before=before: server.worker.statistics().cancelled == before + 1)
            until(lambda: server.worker.open == 0)
        # and both are answered for one that stays
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as connection:
            short = json.dumps({"prompt": "a", "max_tokens": 3, "ignore_eos": True}).encode()
            connection.sendall(2 * (head_of("/v1/completions", len(short)) + short))
            data = b""
            while data.count(b'"finish_reason"') < 2:
                data += connection.recv(4096)
        assert data.count(b"HTTP/1.1 200") == 2


def test_prompts_without_end_are_refused_before_they_are_looked_at(loaded: LoadedModel) -> None:
    """Prevents a list of a million prompts, or of parts of a message, from holding up all other clients."""
    with serving(loaded) as server:
        http = server.http()
        for prompt in ([[1]] * 5000, ["a"] * 5000):
            error = http.post("/v1/completions", json={"prompt": prompt}).json()["error"]
            assert error["message"] == "prompt: 5000 prompts, at most 4096 are possible; send fewer"
        parts = [{"type": "text", "text": "a"}] * 3000
        answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
        assert "messages.0.content: 3000 parts, at most 2048 are possible" in answer.json()["error"]["message"]


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
