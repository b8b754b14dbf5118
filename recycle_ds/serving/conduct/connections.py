"""uvicorn for this application. A connection that is to be closed is closed, also if its client reads nothing."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from recycle_ds.serving.service import Service


def server_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """uvicorn's settings for an application of `create_app`, which logs itself. options: further settings."""
    service: Service = app.state.service
    seconds = service.settings.write_seconds

    class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(cast(asyncio.Transport, _Closing(transport, seconds)))

    return uvicorn.Config(app, http=Connection, log_config=None, access_log=False, **options)


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
