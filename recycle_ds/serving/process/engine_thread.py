"""The thread in which a rank joins the others, loads its part of the model and decodes, while the main thread serves HTTP
and handles signals."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.config.errors import RecycleError
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.loading import engine_of_ranks, load
from recycle_ds.inference.ranks import Ranks, join, lost_ranks_end_the_job
from recycle_ds.parallel.rendezvous import Launch
from recycle_ds.serving.state import ServedModel, State
from recycle_ds.serving.worker import Worker

_log = logging.getLogger("recycle_ds.serving")


@dataclass(frozen=True)
class ModelSettings:
    """What is loaded, and how much it may take on at once. model: folder. kv_memory_gib: of a rank; None takes at most half
    of what is free. max_queued: answers that wait while max_batch others are decoded."""

    model: str
    dtype: str
    threads: int | None
    tensor: int
    pipeline: int
    max_batch: int
    kv_memory_gib: float | None
    max_queued: int


class EngineThread:
    """Runs `ModelSettings` on this rank from `start` until the worker has ended.

    state: gets the model when it can take requests. on_loss: called in a thread when a rank is lost or hangs, see `Liveness`.
    """

    def __init__(
        self, settings: ModelSettings, launch: Launch, state: State, on_loss: Callable[[str, float], None]
    ) -> None:
        self._settings, self._launch, self._state, self._on_loss = settings, launch, state, on_loss
        self._ended = threading.Event()
        self._draining = False
        self.error: BaseException | None = None
        """Why the thread has ended, unless it was asked to."""
        self.lost = ""
        """Names a rank that was lost at the end."""

    def start(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    @property
    def has_followers(self) -> bool:
        """Whether other ranks wait for this one."""
        return self._settings.tensor * self._settings.pipeline > 1

    @property
    def ended(self) -> bool:
        """Whether the thread has ended."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Waits for the end. Returns whether the thread has ended."""
        return self._ended.wait(seconds)

    def drain(self) -> None:
        """Refuses new requests; the thread ends when accepted ones have, and while it loads, after that."""
        self._draining = True
        if self._state.model is not None:
            self._state.model.worker.drain()

    def _run(self) -> None:
        settings = self._settings
        try:
            ranks = join(self._launch, settings.tensor, settings.pipeline, self._on_loss)
            try:
                with lost_ranks_end_the_job():
                    self._decode(ranks)
            except RecycleError:  # planned; after anything else the others must take this rank for lost
                ranks.leave()
                raise
            self.lost = ranks.leave()
        except BaseException as error:
            self.error = error
        finally:
            self._ended.set()

    def _decode(self, ranks: Ranks) -> None:
        """Loads this rank's part of the model, and decodes until the worker ends; on other ranks, until the owner closes its
        engine."""
        settings, start = self._settings, time.monotonic()
        loaded = load(settings.model, settings.dtype, settings.threads, ranks.device_index, ranks.mesh)
        engine = self._engine(loaded, ranks)
        if engine is None:
            return
        if engine.has_module:
            engine.measure_costs()
        worker = Worker(engine, max_queued=settings.max_queued)
        self._state.model = ServedModel(loaded, worker)
        _log.info("ready after %.1f s", time.monotonic() - start)
        if self._draining:  # asked for while it loaded
            worker.drain()
        worker.run()
        if worker.error is not None:
            raise worker.error

    def _engine(self, loaded: LoadedModel, ranks: Ranks) -> DecodingEngine | None:
        """The engine on its owner, None on the other ranks, once the owner has closed it."""
        return engine_of_ranks(loaded, ranks, self._settings.max_batch, self._settings.kv_memory_gib)
