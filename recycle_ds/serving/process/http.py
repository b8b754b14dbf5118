"""Serves HTTP in the main thread until the server is asked to stop or its engine has ended, and drains it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from recycle_ds.parallel.job import Job
from recycle_ds.serving.conduct.connections import server_config
from recycle_ds.serving.process.engine_thread import EngineThread
from recycle_ds.serving.process.stopping import StopSignals
from recycle_ds.serving.state import State

_log = logging.getLogger("recycle_ds.serving")
_TICK = 0.1
_GRACE = 2.0
"""Seconds in which /health reports a failure before the process ends."""
_FLUSH = 2.0
"""Seconds, at least, in which clients can read the end of their answers."""
JOB_MARGIN = 5.0
"""Seconds before the end of the job at which nothing may be left to do."""
_END = 15.0
"""Seconds for the step under way and for the other ranks to end; a lost one is found in that time."""
_PROGRESS = 60.0
"""Seconds between two notes to the job's shell of how much has been done."""


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: `StopSignals` decides."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an application on a listening socket.

    drain_seconds: accepted requests that take longer, once the server must stop, fail with an error. job: the batch job that
    the server is part of; it ends no later than that.
    """

    def __init__(self, app: Any, listener: socket.socket, state: State, drain_seconds: float, job: Job) -> None:
        self._http = _Server(server_config(app, server_header=False))
        self._listener, self._state, self._job = listener, state, job
        self._drain_seconds = drain_seconds

    async def run(self, engine: EngineThread, stop: StopSignals) -> None:
        """Serves until `stop` has a reason and the accepted requests have ended, or until `engine` has ended."""
        serving = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        noted, finished = time.monotonic(), 0
        try:
            while stop.poll() is None and not engine.ended and not serving.done():
                await asyncio.sleep(_TICK)
                if time.monotonic() > noted + _PROGRESS:
                    noted, finished = time.monotonic(), self._note_progress(finished)
            if stop.reason is not None and not engine.ended:
                await self._drain(engine, stop.reason)
            if engine.ended and engine.error is not None:
                self._state.failure = self._state.problem or f"the server could not start: {engine.error}"
                await asyncio.sleep(_GRACE)
        finally:
            # however it ends: clients that neither send nor read do not hold up the end of the process
            seconds = max(self._http.config.timeout_graceful_shutdown or 0, math.ceil(_FLUSH))
            self._http.config.timeout_graceful_shutdown = seconds
            self._http.should_exit = True
            await serving

    async def _drain(self, engine: EngineThread, reason: str) -> None:
        """Ends accepted requests, and then the engine; refuses others."""
        start = time.monotonic()
        seconds = self._drain_seconds
        if self._job.end is not None:
            seconds = max(min(seconds, self._job.end - time.time() - JOB_MARGIN), 0.0)
        self._state.draining = True
        engine.drain()
        if self._state.model is None and not engine.has_followers:  # nothing was accepted, and nobody waits for it
            return
        worker = None if self._state.model is None else self._state.model.worker
        count = 0 if worker is None else worker.open
        _log.info(
            "%s: %d answers are completed, for at most %.1f s; new requests are refused; a "
            "second signal ends the server at once",
            reason,
            count,
            seconds,
        )
        await _wait_for(engine, seconds)
        if not engine.ended and worker is not None:
            _log.warning("answers that are not complete after %.1f s: %d", seconds, worker.open)
            worker.stop(f"the server is shutting down, {seconds:.1f} s after it was asked to")
        await _wait_for(engine, _END)
        # responses that are being sent may take so long; uvicorn reads it when it shuts down
        self._http.config.timeout_graceful_shutdown = math.ceil(max(start + seconds - time.monotonic(), _FLUSH))
        if engine.ended and engine.error is None and not engine.lost:
            _log.info("drained in %.1f s", time.monotonic() - start)

    def _note_progress(self, before: int) -> int:
        """Tells the job's shell that the server has done something since its last start: it counts crashes in a row."""
        model = self._state.model
        finished = 0 if model is None else model.worker.statistics().finished
        if finished > before:
            self._job.write_note("progress", f"{finished} answers")
        return finished


async def _wait_for(engine: EngineThread, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not engine.ended and time.monotonic() < deadline:
        await asyncio.sleep(_TICK / 2)
