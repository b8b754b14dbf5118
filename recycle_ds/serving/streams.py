"""Streams of events from the engine's thread to a reader in an event loop. The engine never waits for a reader."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable

from recycle_ds.serving.events import Delta, Event, Failed, Finished, TokenEvent


class Channel:
    """The part of a stream that the engine's thread knows. It must not refer to the `Stream`, which cancels its request
    when nothing refers to it any more.

    Everything but `cancelled` is used in the event loop only. answers: how many the request has.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, answers: int) -> None:
        self.loop = loop
        self.cancelled = False
        self.complete = False
        """Whether no further event can come."""
        self._unfinished = answers
        self._tokens: dict[int, list[TokenEvent]] = {}
        self._ends: deque[Finished | Failed] = deque()
        self._reader: asyncio.Future[None] | None = None

    def receive(self, events: Iterable[Event]) -> None:
        """Takes in events. Unread tokens of one answer become one Delta: a reader that sleeps costs no more memory than
        the answers themselves."""
        for event in () if self.complete else events:
            if isinstance(event, Delta):
                self._tokens.setdefault(event.index, []).extend(event.tokens)
                continue
            self._ends.append(event)
            self._unfinished -= 1
            self.complete = self.complete or self._unfinished == 0 or isinstance(event, Failed)
        self.wake()

    def wake(self) -> None:
        """Lets the reader look again."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> Event | None:
        """The next event, None after the last one or after `cancelled`."""
        while not self.cancelled:
            if self._tokens:  # the end of an answer comes after all its tokens
                index = next(iter(self._tokens))
                return Delta(index, tuple(self._tokens.pop(index)))
            if self._ends:
                return self._ends.popleft()
            if self.complete:
                return None
            self._reader = self.loop.create_future()
            await self._reader
        return None


class Stream:
    """Events of one request, for one reader: Deltas and a Finished for each answer, or a Failed as the last one.

    The request is cancelled, and its blocks freed, by `cancel` or `aclose`, or when the stream is garbage-collected.
    """

    def __init__(self, channel: Channel, cancel: Callable[[Channel], None]) -> None:
        self._channel, self._cancel = channel, cancel

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        event = await self._channel.next()
        if event is None:
            raise StopAsyncIteration
        return event

    def cancel(self) -> None:
        """Ends the request and this stream. Does nothing if it has ended. May be called in any thread."""
        channel = self._channel
        if channel.cancelled:
            return
        channel.cancelled = True
        if not channel.complete:
            self._cancel(channel)
        with contextlib.suppress(RuntimeError):  # a closed loop has no reader
            channel.loop.call_soon_threadsafe(channel.wake)

    async def aclose(self) -> None:
        """See `cancel`."""
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


def deliver(found: Iterable[tuple[Channel, list[Event]]]) -> None:
    """Hands events over to their event loops, each of which is woken once. A loop that is closed loses them."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Channel, list[Event]]]] = {}
    for channel, events in found:
        by_loop.setdefault(channel.loop, []).append((channel, events))
    for loop, batch in by_loop.items():
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_receive_all, batch)


def _receive_all(batch: list[tuple[Channel, list[Event]]]) -> None:
    for channel, events in batch:
        channel.receive(events)
