"""Clients that go away: what is being decoded for them is cancelled at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed its connection before the answer was complete."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Runs `work`, and cancels it if the client goes away: a server does not do so by itself.

    To be called when the request's body has been read. Raises ClientGone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        gone.cancel()
        while not task.done():
            # again until it ends: before Python 3.12, wait_for loses a cancellation that comes as its own future ends
            task.cancel()
            await asyncio.wait({task}, timeout=0.05)  # it frees what it uses
        with contextlib.suppress(asyncio.CancelledError, Exception):
            task.exception()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
