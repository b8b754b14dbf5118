"""What one rank of the server does from its start to its end."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from recycle_ds.config.errors import RecycleError
from recycle_ds.parallel.job import FINISHED, SAVED_FOR_RESTART, Job
from recycle_ds.parallel.peers import PEER_LOST
from recycle_ds.parallel.rendezvous import Launch, exit_process
from recycle_ds.serving.process.engine_thread import EngineThread, ModelSettings
from recycle_ds.serving.process.http import JOB_MARGIN, HttpServer
from recycle_ds.serving.process.stopping import JOB_ENDS, StopSignals
from recycle_ds.serving.state import State
from recycle_ds.serving.worker import RANK_LOST

ENGINE_FAILED = 1
"""Exit code after an exception in the engine."""
# Seconds in which /health reports that a rank is lost.
_LOSS = 1.0


@dataclass(frozen=True)
class Shutdown:
    """drain_seconds: accepted requests that take longer fail. restart: a batch job that was drained is started again."""

    drain_seconds: float
    restart: bool = False


def run_rank(
    settings: ModelSettings,
    launch: Launch,
    listener: socket.socket | None,
    create_app: Callable[[State], Any],
    shutdown: Shutdown,
    job: Job,
) -> NoReturn:
    """Serves on the rank with a listening socket (rank 0), follows it on the others. Ends the process: with code 0 after a
    drain.

    create_app: the ASGI application for a state. Raises RecycleError and OSError of what could not be started.
    """
    state = State()
    if listener is None:
        engine = EngineThread(settings, launch, state, _end_on_loss(state, 0.0))
        StopSignals().install()
        engine.start()
        while not engine.wait(1.0):  # the main thread handles signals
            pass
        _end(engine, state)
    engine = EngineThread(settings, launch, state, _end_on_loss(state, _LOSS))
    latest = None if job.end is None else job.end - shutdown.drain_seconds - 2 * JOB_MARGIN
    stop = StopSignals(job.stop_file, latest)
    stop.install()
    server = HttpServer(create_app(state), listener, state, shutdown.drain_seconds, job)
    engine.start()
    asyncio.run(server.run(engine, stop))
    if stop.reason is not None:
        # a launcher that has lost a rank sends a signal too: that job has crashed, and is started again
        if stop.reason == JOB_ENDS or (engine.error is None and not engine.lost):
            job.write_note("outcome", SAVED_FOR_RESTART if shutdown.restart else FINISHED)
        if not engine.ended:  # it loads a model that nobody waits for any more, or a step takes very long
            exit_process(0)
    _end(engine, state)


def _end(engine: EngineThread, state: State) -> NoReturn:
    error = engine.error
    if isinstance(error, RecycleError | OSError):
        raise error
    if error is not None:
        if state.model is None:  # the worker has logged its own
            traceback.print_exception(error)
        print(f"error: {state.problem or type(error).__name__}", file=sys.stderr, flush=True)
        exit_process(ENGINE_FAILED)
    if engine.lost:
        print(f"error: {engine.lost}", file=sys.stderr, flush=True)
        exit_process(PEER_LOST)
    exit_process(0)


def _end_on_loss(state: State, least: float) -> Callable[[str, float], None]:
    """Prints the message about a lost rank, lets /health report it for some seconds, and ends the process. least: seconds."""

    def end(text: str, seconds: float) -> None:
        if text:
            print(f"error: {text}", file=sys.stderr, flush=True)
        state.failure = text or "a rank is lost or hangs"
        if state.model is not None:
            state.model.worker.give_up(RANK_LOST)
        time.sleep(max(seconds, least))
        os._exit(PEER_LOST)

    return end
