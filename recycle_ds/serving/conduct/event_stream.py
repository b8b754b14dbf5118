"""Server-sent events: sent as they come, with comments while nothing does, until the client has all or is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from recycle_ds.serving.conduct.disconnects import ClientGone, unless_disconnected
from recycle_ds.serving.protocol.errors import ApiError, internal

_DONE = b"data: [DONE]\n\n"
_COMMENT = b": waiting\n\n"
# Line ends of Unicode: many clients split streams at them, although only CR and LF end a line of an event.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


class SlowReader(ClientGone):
    """The client has not read what was sent for too long."""


def bounded(send: Send, seconds: float) -> Send:
    """`send`, which raises SlowReader for a message that waits longer than `seconds` for the client to read."""

    async def sending(message: Message) -> None:
        try:
            await asyncio.wait_for(send(message), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise SlowReader from None

    return sending


class EventStream(Response):
    """Sends JSON objects as events. An error in the middle becomes an event, since the status has been sent."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        *,
        keep_alive_seconds: float,
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        """on_end: called once with the error that ended the stream, or None."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end
        self._keep_alive_seconds = keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response. Raises an error of the server itself when the client has been told of it."""
        ended: BaseException | None = None
        try:
            await unless_disconnected(receive, self._send_all(send))
        except (ClientGone, ApiError) as error:
            ended = error
        except BaseException as error:
            ended = error
            raise
        finally:
            await self._events.aclose()  # also if it was never begun
            self._on_end(ended)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        failure: Exception | None = None
        try:
            await self._send_events(send)
        except ClientGone:
            raise
        except Exception as error:
            failure = error
            body = error.body if isinstance(error, ApiError) else internal().body
            await self._write(send, event(body))
        await self._write(send, _DONE, last=True)
        if failure is not None:
            raise failure

    async def _send_events(self, send: Send) -> None:
        following: asyncio.Future[dict[str, Any]] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait({following}, timeout=self._keep_alive_seconds)
                if not done:
                    await self._write(send, _COMMENT)
                    continue
                try:
                    content = following.result()
                except StopAsyncIteration:
                    return
                following = None
                await self._write(send, event(content))
        finally:
            if following is not None:
                following.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                    await following

    async def _write(self, send: Send, body: bytes, last: bool = False) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": not last})


def event(content: dict[str, Any]) -> bytes:
    """An event of a stream."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_LINE_ENDS)
    return f"data: {text}\n\n".encode()
