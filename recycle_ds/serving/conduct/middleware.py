"""Around every request: its id, the API key, the size and time of its body, errors in OpenAI's shape, the log's line."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recycle_ds.serving.access import is_allowed, is_host_allowed
from recycle_ds.serving.conduct.disconnects import ClientGone
from recycle_ds.serving.conduct.event_stream import SlowReader, bounded
from recycle_ds.serving.conduct.log import Record, request_id
from recycle_ds.serving.protocol.errors import ApiError, internal
from recycle_ds.serving.service import Service

_GONE = 499  # nginx's status of a request whose client went away; nobody reads it


class Conduct:
    """Middleware of the application. A route's errors are answered here if its response has not started."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, headers = self._service, Headers(scope=scope)
        record = Record(
            request_id=request_id(headers.get("x-request-id")),
            method=scope["method"],
            path=scope["path"],
            client=scope["client"][0] if scope.get("client") else None,
            started=service.clock(),
        )
        scope.setdefault("state", {})["record"] = record
        bounded_send = bounded(send, service.settings.write_seconds)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await bounded_send(message)

        try:
            try:
                await self._serve(scope, headers, receive, sending)
            except ClientGone:
                raise
            except Exception as error:
                await self._answer(error, record, scope, receive, sending)
        except ClientGone as error:
            record.status = record.status or _GONE
            record.ended = "slow_reader" if isinstance(error, SlowReader) else "disconnected"
        except asyncio.CancelledError:  # the server ends without this client; uvicorn would log a trace of it
            record.status, record.ended = record.status or _GONE, "disconnected"
        finally:
            self._finish(record, scope)

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        self._check(scope, headers)
        body = _Body(receive, self._service).receive
        if scope["method"] != "POST":
            await self._app(scope, body, send)
            return
        # taken before the body is read: bodies take memory, and their texts take time to encode
        release = self._service.take_slot()
        try:
            await self._app(scope, body, send)
        finally:
            release()

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError for a request that no route needs to see."""
        settings = self._service.settings
        if not is_host_allowed(headers.get("host"), settings.host, settings.allowed_hosts, settings.api_keys):
            raise ApiError(
                403,
                f"host {headers['host'][:80]!r}: not a name of this server; ask for 127.0.0.1 or localhost, or start it with "
                "--allowed-host NAME",
                code="host_not_allowed",
            )
        if not is_allowed(scope["path"], headers.get("authorization"), settings.api_keys):
            raise ApiError(
                401,
                "no valid API key: send the header `Authorization: Bearer KEY` with a key of this server",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > settings.max_body_bytes:
            raise too_large(settings.max_body_bytes)

    async def _answer(self, error: Exception, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
        known = error if isinstance(error, ApiError) else internal()
        record.ended, record.error = "error", known.code
        if known is not error:
            self._service.log.error(record.request_id, error)
        if record.status is None:
            await respond(known)(scope, receive, send)

    def _finish(self, record: Record, scope: Scope) -> None:
        service = self._service
        if record.status is None:  # the interpreter ends
            record.status, record.ended = _GONE, "disconnected"
        route: Any = scope.get("route")
        service.metrics.requests.labels(getattr(route, "path", "other"), str(record.status)).inc()
        if record.ended in ("disconnected", "slow_reader"):
            service.metrics.disconnects.inc()
        service.log.request(record, service.clock() - record.started)


class _Body:
    """A request's body, in limits of size and time."""

    def __init__(self, receive: Receive, service: Service) -> None:
        self._receive, self._settings = receive, service.settings
        self._size = 0
        self._complete = False
        self._deadline: float | None = None

    async def receive(self) -> Message:
        """The next message. Raises ApiError: 413 or 408."""
        if self._complete:  # the next one is that the client goes away
            return await self._receive()
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._settings.body_seconds
        try:
            message = await asyncio.wait_for(self._receive(), max(self._deadline - now, 0.001))
        except (TimeoutError, asyncio.TimeoutError):
            seconds = self._settings.body_seconds
            message_text = f"the body did not arrive within {seconds:g} s: send it faster"
            raise ApiError(408, message_text, code="body_timeout", headers={"connection": "close"}) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._settings.max_body_bytes:
            raise too_large(self._settings.max_body_bytes)
        return message


def too_large(most: int) -> ApiError:
    """A body beyond the limit: 413."""
    return ApiError(
        413,
        f"the body is larger than {most} bytes: send less, or raise the server's --max-body-mib",
        code="body_too_large",
        headers={"connection": "close"},
    )


def respond(error: ApiError) -> JSONResponse:
    """The response to an error."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)
