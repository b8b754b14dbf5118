"""The thread that owns the engine: takes requests from event loops, runs steps while there are any, and sends events back.

No other thread calls the engine, apart from its `check` and for reading counts. Nothing that a reader does or leaves
undone can hold up a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.sequence import Sequence
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.parallel.peers import PeerLost, lost_peer
from recycle_ds.serving.accepted import Answer, Request
from recycle_ds.serving.events import Failed
from recycle_ds.serving.refusals import Draining, EngineFailed, QueueFull
from recycle_ds.serving.statistics import AcceptanceByContext, Statistics, latest_budget
from recycle_ds.serving.streams import Channel, Stream, deliver

_log = logging.getLogger("recycle_ds.serving")
RANK_LOST = "a rank of the server is lost; its log names it"
_POLL = 0.05


@dataclass(frozen=True)
class _Stop:
    error: str


@dataclass(frozen=True)
class _Wake:
    pass


class Worker:
    """Runs an engine for many readers.

    max_queued: answers that may wait while `max_batch` others run. keep_alive: seconds of idleness after which the ranks
    that wait for a step wait anew; shorter than the timeout of their process group.
    """

    def __init__(self, engine: DecodingEngine, *, max_queued: int = 256, keep_alive: float = 60.0) -> None:
        self.engine, self.max_queued, self._keep_alive = engine, max_queued, keep_alive
        self.most_answers = engine.scheduler.max_batch + max_queued
        """Answers that can be decoded and wait at once."""
        self.failure: str | None = None
        """Why the engine broke, in one line."""
        self.error: Exception | None = None
        """The exception behind it."""
        # SimpleQueue.put may be called by a destructor in the middle of anything
        self._inbox: queue.SimpleQueue[Request | Channel | _Stop | _Wake] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0
        self._draining = False
        self._ended = threading.Event()
        self._requests: dict[Channel, Request] = {}
        self._answers: dict[Sequence, Answer] = {}
        self._acceptance = AcceptanceByContext()
        self._steps = self._new_tokens = self._finished = self._cancelled = self._failed = 0

    # ---- any thread

    def start(self) -> None:
        """Starts a thread that runs `run`."""
        threading.Thread(target=self.run, name="engine", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the engine works: it has neither failed nor ended."""
        return self.failure is None and not self._ended.is_set()

    @property
    def open(self) -> int:
        """Answers that are accepted and have not ended."""
        return self._open

    def submit(
        self,
        prompt_ids: Iterable[int],
        params: SamplingParams,
        mode: str = "verified",
        *,
        priority: int = 0,
        rejected: bool = False,
    ) -> Stream:
        """Accepts a request, for `params.n` answers. To be called in the event loop that reads the stream.

        rejected: whether events name the drafts that verification threw away. Raises DecodingError for a request that
        cannot be decoded, EngineFailed, Draining or QueueFull for one that cannot be taken now.
        """
        prompt = list(prompt_ids)
        self._refuse_if_closed()
        self.engine.check(prompt, params, mode)
        most = self.most_answers
        if params.n > most:
            raise DecodingError(f"n={params.n}: this server decodes and queues at most {most} answers (--max-queued)")
        channel = Channel(asyncio.get_running_loop(), params.n)
        with self._lock:
            self._refuse_if_closed()  # the thread may have ended since the first look
            if self._open + params.n > most:
                raise QueueFull(f"{self._open} answers are being decoded or wait, of at most {most}: try again later")
            self._open += params.n
            self._inbox.put(Request(channel, prompt, params, mode, priority, rejected))
        return Stream(channel, self._inbox.put)

    def _refuse_if_closed(self) -> None:
        if self.failure is not None:
            raise EngineFailed(self.failure)
        if self._draining:
            raise Draining("the server is shutting down and takes no new requests")

    def drain(self) -> None:
        """Refuses new requests. The thread ends when the accepted ones have."""
        with self._lock:
            self._draining = True
        self._inbox.put(_Wake())

    def stop(self, error: str) -> None:
        """Refuses new requests and ends accepted ones after the step under way: their streams get a Failed."""
        self.drain()
        self._inbox.put(_Stop(error))

    def give_up(self, error: str) -> None:
        """Fails all accepted requests at once, whatever the engine's thread waits for: a rank is lost or hangs. The engine is
        not used again."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = error
            self._failed += self._open
        self._tell_failure(error, list(self._requests.values()))

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end of `run`. Returns whether it has ended. Not to be called in an event loop."""
        return self._ended.wait(timeout)

    async def stopped(self) -> None:
        """Waits for the end of `run`."""
        while not self._ended.is_set():
            await asyncio.sleep(_POLL)

    def statistics(self) -> Statistics:
        """Counts at this moment. A step under way may change some of them meanwhile."""
        scheduler = self.engine.scheduler
        pool, running = scheduler.pool, len(scheduler.running)
        return Statistics(
            waiting=max(self._open - running, 0),
            running=running,
            max_batch=scheduler.max_batch,
            max_queued=self.max_queued,
            blocks_used=pool.count - pool.free,
            blocks_total=pool.count,
            preemptions=scheduler.preemptions,
            reused_tokens=scheduler.reused_tokens,
            steps=self._steps,
            new_tokens=self._new_tokens,
            finished=self._finished,
            cancelled=self._cancelled,
            failed=self._failed,
            acceptance_by_context=self._acceptance.counts(),
            budget=latest_budget(scheduler.budget),
        )

    # ---- the engine's thread

    def run(self) -> None:
        """Runs steps until `drain` or `stop`, then closes the engine. After an exception all streams get a Failed."""
        try:
            while self._take_messages():
                if self.engine.unfinished:
                    self._steps += 1
                    self._publish(self.engine.step())
            self.engine.close()
        except Exception as error:
            self._fail(error)
        finally:
            self._ended.set()

    def _take_messages(self) -> bool:
        """Takes in all messages, and waits for one if there is nothing to do. Returns False when the work is done."""
        while True:
            busy = self.engine.unfinished
            try:
                message = self._inbox.get_nowait() if busy or self._done else self._inbox.get(timeout=self._keep_alive)
            except queue.Empty:
                if busy or self._done:
                    return busy
                self.engine.keep_alive()
                continue
            if isinstance(message, Request):
                self._add(message)
            elif isinstance(message, Channel):
                self._cancel(message)
            elif isinstance(message, _Stop):
                self._fail_all(message.error)

    @property
    def _done(self) -> bool:
        return self._draining and self._open == 0

    def _add(self, request: Request) -> None:
        if request.channel.cancelled:  # before it began
            self._close(request.params.n)
            self._cancelled += request.params.n
            return
        try:
            request.sequences = self.engine.add(request.prompt, request.params, request.mode, priority=request.priority)
        except DecodingError as error:
            self._close(request.params.n)
            self._failed += request.params.n
            deliver([(request.channel, [Failed(str(error))])])
            return
        self._requests[request.channel] = request
        for index, sequence in enumerate(request.sequences):
            sequence.rejected = {} if request.rejected else None
            self._answers[sequence] = Answer(request, index)

    def _cancel(self, channel: Channel) -> None:
        if channel in self._requests:
            self._end_early(self._requests[channel])

    def _end_early(self, request: Request) -> None:
        """Ends a request, now or with the step under way. Its reader gets no further event."""
        request.closed = True
        for sequence in list(request.sequences):
            self.engine.cancel(sequence)
            if sequence.ended_at is not None:
                self._acceptance.observe(sequence)
                self._forget(sequence)
                self._cancelled += 1

    def _publish(self, done: list[Sequence]) -> None:
        """Sends what a step has added to the answers."""
        found = []
        for sequence in (*self.engine.scheduler.running, *done):
            answer = self._answers.get(sequence)
            if answer is None:
                continue
            before = answer.sent
            events = answer.news(sequence)
            self._new_tokens += answer.sent - before
            self._acceptance.observe(sequence)
            if sequence.ended_at is not None:
                self._forget(sequence)
                self._cancelled += sequence.cancelled
                self._finished += not sequence.cancelled
            if events and not answer.request.closed:
                found.append((answer.request.channel, events))
        deliver(found)

    def _forget(self, sequence: Sequence) -> None:
        """Removes an answer that has ended."""
        request = self._answers.pop(sequence).request
        request.sequences.remove(sequence)
        if not request.sequences:
            del self._requests[request.channel]
        self._close(1)

    def _close(self, answers: int) -> None:
        with self._lock:
            self._open -= answers

    def _fail_all(self, error: str) -> None:
        """Ends all accepted answers."""
        requests = list(self._requests.values())
        for request in requests:
            self._end_early(request)
        deliver([(request.channel, [Failed(error)]) for request in requests])

    def _fail(self, error: Exception) -> None:
        """After an exception. The engine is not used again."""
        text = f"the engine failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, PeerLost) or lost_peer(error) is not None:  # `Liveness` finds out which one
            text = RANK_LOST
        else:
            _log.error("the engine failed", exc_info=error)
        with self._lock:
            known, self.error, self.failure = self.failure, error, self.failure or text
            self._failed, self._open = self._failed + (0 if known else self._open), 0
        self.engine.abort()
        if not known:
            self._tell_failure(text, list(self._requests.values()))

    def _tell_failure(self, text: str, requests: list[Request]) -> None:
        """Ends the streams of these requests, and of those that the engine's thread has not seen."""
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, Request):
                    requests.append(message)
        deliver([(request.channel, [Failed(text)]) for request in requests if not request.closed])
