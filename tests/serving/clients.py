"""Clients for the server under load: some read, some read slowly or not at all, some go away, some send nonsense.

All of them run in one event loop and write HTTP themselves, so that they can do what no library would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
_PATIENCE = 120.0


@dataclass(frozen=True)
class Reply:
    """A response that was read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes


def post(
    path: str,
    content: bytes,
    *,
    kind: str = "application/json",
    declared: int | None = None,
    request_id: str = "",
) -> bytes:
    """A request as bytes. declared: its content-length; by default the right one."""
    length = len(content) if declared is None else declared
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n"
    head += f"x-request-id: {request_id}\r\n" if request_id else ""
    return f"{head}connection: close\r\n\r\n".encode() + content


def chunked(path: str, pieces: list[bytes]) -> bytes:
    """A request whose body has no declared length."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
    )
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return f"{head}connection: close\r\n\r\n".encode() + body + b"0\r\n\r\n"


class Client:
    """One connection at a time to a server on this machine. source: of all random decisions."""

    def __init__(self, port: int, source: random.Random) -> None:
        self._port, self._source = port, source

    async def ask(self, request: bytes) -> Reply:
        """Sends a request and reads the response as fast as it comes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(request)
            return _parsed(await asyncio.wait_for(reader.read(-1), _PATIENCE))
        finally:
            await _close(writer)

    async def ask_slowly(self, request: bytes) -> Reply:
        """Reads a few bytes at a time, with a small buffer, so that the server has to wait."""
        with _narrow_socket() as connection:
            loop, parts = asyncio.get_running_loop(), []
            await loop.sock_connect(connection, ("127.0.0.1", self._port))
            await loop.sock_sendall(connection, request)
            while part := await asyncio.wait_for(loop.sock_recv(connection, 1024), _PATIENCE):
                parts.append(part)
                await asyncio.sleep(0.002)
        return _parsed(b"".join(parts))

    async def sleep(self, request: bytes, dropped: Callable[[], bool]) -> socket.socket:
        """Reads nothing, until the server has given up on it. Returns the connection, which this end has not closed."""
        connection, loop = _narrow_socket(), asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", self._port))
        await loop.sock_sendall(connection, request)
        for _ in range(int(_PATIENCE / 0.02)):
            if dropped():
                return connection
            await asyncio.sleep(0.02)
        raise AssertionError("the server decodes for a client that does not read")

    async def leave(self, request: bytes, after: str) -> None:
        """Goes away. after: "body" (half of it is sent), "request" (nothing is read), "events" (a stream's first ones)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(request[: -len(request) // 3] if after == "body" else request)
        await writer.drain()
        if after == "events":
            read, wanted = b"", self._source.randint(1, 6)
            while read.count(b"data: ") < wanted and (part := await asyncio.wait_for(reader.read(900), _PATIENCE)):
                read += part
        else:
            await asyncio.sleep(self._source.choice([0.0, 0.005, 0.03, 0.1, 1.0]))
        if self._source.random() < 0.5:
            writer.transport.abort()  # a reset instead of an orderly end
        await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):  # the server was faster
        await writer.wait_closed()


def _narrow_socket() -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.setblocking(False)
    return connection


def _parsed(data: bytes) -> Reply:
    head, found, rest = data.partition(b"\r\n\r\n")
    assert found, f"no complete response: {data[:200]!r}"
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while True:
            size, found, rest = rest.partition(b"\r\n")
            assert found, "the response ends in the middle"
            if int(size, 16) == 0:
                break
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    else:
        body = rest
        assert len(body) == int(headers["content-length"]), "the response ends in the middle"
    return Reply(int(first.split(" ")[1]), headers, body)


def choices_of(reply: Reply, stream: bool) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Text, ids, log probabilities and reason of each choice, of a stream or a complete answer, and the usage."""
    found: dict[int, dict[str, Any]] = {}
    usage: dict[str, Any] = {}

    def add(content: dict[str, Any]) -> None:
        assert "error" not in content, content
        usage.update(content.get("usage") or {})
        for choice in content["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "ids": [], "logprobs": [], "reason": None})
            part = choice.get("delta", choice.get("message", choice))
            one["text"] += part.get("content") or part.get("text") or ""
            one["ids"] += [token["id"] for token in choice.get("tokens", ())]
            scores = choice.get("logprobs") or {}
            one["logprobs"] += scores.get("token_logprobs") or [item["logprob"] for item in scores.get("content", ())]
            one["reason"] = choice["finish_reason"] or one["reason"]

    if not stream:
        add(json.loads(reply.body))
        return found, usage
    events = [part for part in reply.body.decode().split("\n\n") if part and not part.startswith(":")]
    assert events[-1] == "data: [DONE]", events[-1]
    for line in events[:-1]:
        add(json.loads(line.removeprefix("data: ")))
    return found, usage
