"""All answers to one HTTP request: submitted together, read as one stream of steps, cancelled together."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import Generation
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.text_stream import TextStream
from recycle_ds.serving.answers.sampling import as_invalid
from recycle_ds.serving.answers.text import AnswerText, TokenText
from recycle_ds.serving.answers.usage import Usage
from recycle_ds.serving.events import Delta, Event, Failed, Finished
from recycle_ds.serving.protocol.errors import (
    ENGINE_FAILED,
    ApiError,
    busy,
    failed,
    internal,
    invalid,
    timeout,
    unavailable,
)
from recycle_ds.serving.refusals import Draining, QueueFull, WorkerError
from recycle_ds.serving.streams import Stream
from recycle_ds.serving.worker import Worker

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
"""OpenAI's names of the engine's reasons to end an answer."""


@dataclass(frozen=True)
class Step:
    """What has been added to one choice. reason: why it ended, in its last step only, with the engine's own result."""

    index: int
    text: str
    tokens: list[TokenText]
    reason: str | None = None
    generation: Generation | None = None


@dataclass(frozen=True)
class Task:
    """What is to be decoded. by_token: whether single tokens are reported. prompt_only: whether
    only prompts are asked for. seconds: time for all of it. shows_causes: whether the client may see why the engine
    failed."""

    prompts: Sequence[list[int]]
    params: SamplingParams
    mode: str
    priority: int = 0
    rejected: bool = False
    by_token: bool = False
    prompt_only: bool = False
    seconds: float = 600.0
    retry_after: int = 2
    shows_causes: bool = True


class Answering:
    """The answers to a task. Choices are numbered prompt by prompt, `params.n` for each."""

    def __init__(
        self, worker: Worker, tokenizer: Tokenizer, task: Task, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Submits everything, or nothing. Raises ApiError for a request that cannot be taken."""
        self.task, self._worker, self._clock = task, worker, clock
        check_count(len(task.prompts), task.params.n, worker.most_answers)
        self.usage = Usage(task.mode, clock(), sum(map(len, task.prompts)), task.prompt_only)
        hidden = tokenizer.end_ids | set(task.params.stop_tokens)
        stop, least = task.params.stop, task.params.min_new_tokens
        self._texts = [
            AnswerText(TextStream(tokenizer, after=prompt), stop, hidden, by_token=task.by_token, least=least)
            for prompt in task.prompts
            for _ in range(task.params.n)
        ]
        self._unfinished = len(self._texts)
        self._expired = False
        self._streams: list[Stream] = []
        # from now on, whether or not somebody reads; the timer does not keep alive what nobody uses any more
        reference = weakref.ref(self)
        self._expiry = asyncio.get_running_loop().call_later(task.seconds, _expire, reference)
        try:
            for prompt in task.prompts:  # a lower priority is earlier, as in vLLM
                stream = worker.submit(prompt, task.params, task.mode, priority=-task.priority, rejected=task.rejected)
                self._streams.append(stream)
        except BaseException as error:
            self.cancel()
            if isinstance(error, DecodingError):
                raise as_invalid(error) from error
            if isinstance(error, WorkerError):
                raise refusal(error, task.retry_after, task.shows_causes) from error
            raise

    def cancel(self) -> None:
        """Ends what still runs and frees its memory."""
        self._expiry.cancel()
        for stream in self._streams:
            stream.cancel()

    async def steps(self) -> AsyncGenerator[Step, None]:
        """What is added to the choices, as it is decoded. Raises ApiError if not all of them can be completed.

        Whatever ends the iteration cancels the rest.
        """
        events = self._events()
        try:
            async for number, event in events:
                if isinstance(event, Failed):
                    raise failed(f"the answer was not completed: {self._shown(event.error)}")
                step = self._take(number, event)
                if step is not None:
                    yield step
            if self._unfinished:
                raise timeout(self.task.seconds) if self._expired else internal()
        finally:
            self.cancel()
            await events.aclose()

    def _shown(self, cause: str) -> str:
        """Why the engine ended an answer, for the client."""
        return cause if self.task.shows_causes or self._worker.failure is None else ENGINE_FAILED

    def _take(self, number: int, event: Delta | Finished) -> Step | None:
        """The step that an event of a prompt's stream makes; None for tokens that release nothing yet."""
        index = number * self.task.params.n + event.index
        answer = self._texts[index]
        if isinstance(event, Delta):
            self.usage.add(event.tokens, self._clock())
            text, tokens = answer.feed(event.tokens)
            return Step(index, text, tokens) if text or tokens else None
        self.usage.end(event)
        self._unfinished -= 1
        text, tokens = answer.finish()
        return Step(index, text, tokens, REASONS.get(event.generation.finish_reason, "stop"), event.generation)

    async def _events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of all streams, with the prompt's number."""
        if len(self._streams) == 1:
            async for event in self._streams[0]:
                yield 0, event
            return
        arrived: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()

        async def forward(number: int, stream: Stream) -> None:
            async for event in stream:
                await arrived.put((number, event))
            await arrived.put((number, None))

        tasks = [asyncio.create_task(forward(number, stream)) for number, stream in enumerate(self._streams)]
        try:
            left = len(tasks)
            while left:
                number, found = await arrived.get()
                if found is None:
                    left -= 1
                else:
                    yield number, found
        finally:
            for task in tasks:
                task.cancel()


def _expire(reference: weakref.ref[Answering]) -> None:
    answering = reference()
    if answering is not None:
        answering._expired = True
        answering.cancel()


def check_count(prompts: int, n: int, most: int) -> None:
    """Raises ApiError (400) for a request with more answers than can ever be decoded and wait."""
    if prompts * n <= most:
        return
    raise invalid(
        f"{prompts} prompts with n={n} are {prompts * n} answers, this server decodes and queues at most {most} "
        "(--max-batch and --max-queued); ask for fewer at once",
        "prompt" if prompts > 1 else "n",
    )


def refusal(error: WorkerError, retry_after: int, shows_causes: bool) -> ApiError:
    """Why the worker takes no request now, for the client."""
    if isinstance(error, QueueFull):
        return busy(str(error), retry_after)
    if isinstance(error, Draining):
        return unavailable(str(error), "draining", retry_after)
    return unavailable(str(error) if shows_causes else ENGINE_FAILED, "failed", retry_after)
