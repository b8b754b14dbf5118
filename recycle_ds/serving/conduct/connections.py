"""uvicorn for this application. Connections are limited in number, and closed when their client sends or reads nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from recycle_ds.serving.protocol.errors import unavailable
from recycle_ds.serving.service import Service
from recycle_ds.serving.settings import ServerSettings

_MOST_AHEAD = 2**16
"""Bytes of further requests that are read while one is being answered."""


def server_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """uvicorn's settings for an application of `create_app`, which logs itself. options: further settings."""
    service: Service = app.state.service
    settings = service.settings

    class Connection(H11Protocol):
        """One connection, with limits of time: `body_seconds` for the head of a request, twice `write_seconds` for a
        client that reads nothing. The application drops the request of such a client after `write_seconds`, but uvicorn
        itself may wait on, to send an error."""

        _head: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(cast(asyncio.Transport, _Closing(transport, settings.write_seconds)))
            if len(self.connections) > settings.max_connections:
                self.transport.write(_refusal(settings))
                self.transport.close()
                return
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # uvicorn stops reading when a further request is there already, and would not see that the client goes away; of one
            # that has sent more than is read ahead, it is seen when this request is answered
            if not self._is_idle and not self.cycle.more_body and len(self.conn.trailing_data[0]) <= _MOST_AHEAD:
                self.flow.resume_reading()
            if self._is_idle:
                self._wait_for_head()
            else:
                self._stop_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head()
            self._stop_unread()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(2 * settings.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop_unread()
            super().resume_writing()

        @property
        def _is_idle(self) -> bool:
            """Whether no request is being answered."""
            return self.cycle is None or self.cycle.response_complete

        def _wait_for_head(self) -> None:
            self._head = self._head or self.loop.call_later(settings.body_seconds, self._close_if_idle)

        def _stop_head(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _stop_unread(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _close_if_idle(self) -> None:
            self._head = None
            if self._is_idle:
                self.transport.close()

    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",  # there are no web sockets
        log_config=None,
        access_log=False,
        proxy_headers=False,  # any local client could choose the address that is logged
        **options,
    )


def _refusal(settings: ServerSettings) -> bytes:
    """The response to a connection beyond the limit, whose request is not read."""
    error = unavailable(
        f"{settings.max_connections} connections are open, the most at once: try again later",
        "too_many_connections",
        settings.retry_after,
    )
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"{name}: {value}" for name, value in (headers | error.headers).items()]
    return "\r\n".join([f"HTTP/1.1 {error.status} Service Unavailable", *lines, "\r\n"]).encode() + body


class _Closing:
    """A transport that gives up what its client has not read some seconds after `close`. asyncio's own waits for ever: a
    client that was dropped because it reads nothing would keep its connection, and what is buffered for it."""

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport, self._seconds = transport, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Closes the connection as soon as everything is sent, at the latest when the time is over."""
        if not self._transport.is_closing() and self._transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(self._seconds, self._transport.abort)
        self._transport.close()
