"""What all routes share: the state, the settings, the loaded model's tokenizer and template, logs and metrics."""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO, TypeVar

from starlette.requests import Request

from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.parameters import MODES
from recycle_ds.serving.access import sees_causes
from recycle_ds.serving.answers.chat import Chats
from recycle_ds.serving.answers.sampling import Capacity
from recycle_ds.serving.answers.tokens import TokenNames
from recycle_ds.serving.conduct.log import Log
from recycle_ds.serving.metrics import Metrics
from recycle_ds.serving.protocol.chats import ChatFields
from recycle_ds.serving.protocol.errors import ENGINE_FAILED, ApiError, busy, invalid, unavailable
from recycle_ds.serving.protocol.parsing import Body, parse
from recycle_ds.serving.settings import ServerSettings
from recycle_ds.serving.state import ServedModel, State
from recycle_ds.serving.worker import Worker

AnyBody = TypeVar("AnyBody", bound=Body)
_SMALL_BODY = 2**16
"""Bytes of a body that is parsed at once; a larger one in a thread."""
_LONG = 2000  # characters from which a text is encoded in a thread, so that other requests need not wait


@dataclass(frozen=True)
class Model:
    """What a request needs of the loaded model."""

    worker: Worker
    tokenizer: Tokenizer
    names: TokenNames
    chats: Chats
    capacity: Capacity
    most_characters: int
    """Characters that the longest tokens could make of a full context: a longer text is not even encoded."""

    @classmethod
    def of(cls, served: ServedModel) -> Model:
        """Reads what is read once. Takes a moment."""
        engine, tokenizer = served.worker.engine, served.loaded.tokenizer
        pool = engine.scheduler.pool
        modes = MODES if engine.has_module else ("autoregressive",)
        capacity = Capacity(engine.max_positions, pool.count * pool.size, pool.size, modes)
        names = TokenNames(tokenizer)
        # bytes, so that it is right for tokens that are parts of characters
        longest = max((len(names.bytes_of(one)) for one in tokenizer.token_ids), default=1)
        return cls(served.worker, tokenizer, names, Chats(tokenizer), capacity, capacity.context * max(longest, 1))

    async def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text. Raises ApiError (400) for a text that cannot be encoded, or that cannot fit."""
        self._check_length(len(text), "prompt")
        encode = functools.partial(self.tokenizer.encode, text, parse_special=parse_special)
        try:
            return encode() if len(text) < _LONG else await asyncio.to_thread(encode)
        except DataError as error:
            raise invalid(str(error), "prompt") from error

    async def encode_chat(self, chat: ChatFields) -> list[int]:
        """Token ids of a chat, rendered by the model's template. Raises ApiError (400)."""
        self._check_length(sum(len(message.text) for message in chat.messages), "messages")
        # in a thread: the first call imports the renderer, and a template may be slow
        try:
            return await asyncio.to_thread(self.chats.encode, chat)
        except DataError as error:
            raise invalid(str(error), "messages") from error

    def _check_length(self, characters: int, param: str) -> None:
        if characters > self.most_characters:
            raise invalid(
                f"{param}: {characters} characters, more than the model's context of {self.capacity.context} tokens can "
                f"hold (at most {self.most_characters}): shorten it",
                param,
                "context_length_exceeded",
            )


class Service:
    """Shared by the routes of one application."""

    def __init__(
        self, state: State, settings: ServerSettings, *, log: TextIO | None = None, clock: Callable[[], float]
    ) -> None:
        self.state, self.settings, self.clock = state, settings, clock
        self.log = Log(log or sys.stderr, settings.access_log)
        self.metrics = Metrics(state, lambda: self._requests, settings.max_requests)
        self.created = int(time.time())
        self._model: Model | None = None
        self._lock = asyncio.Lock()
        self._requests = 0

    async def model(self, request: Request, name: str | None = None) -> Model:
        """The model. Raises ApiError: 503 if no request is taken now, 404 if it is not the one named."""
        self._check_ready(request)
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"model={name[:80]!r}: this server has {self.settings.model_name!r} only; see /v1/models",
                param="model",
                code="model_not_found",
            )
        async with self._lock:
            if self._model is None:
                assert self.state.model is not None
                self._model = await asyncio.to_thread(Model.of, self.state.model)
                if self.settings.default_mode not in self._model.capacity.modes:
                    self.log.warning(
                        f"the model has no recycle module: requests are decoded autoregressively, not in mode "
                        f"{self.settings.default_mode}"
                    )
        return self._model

    def shows_causes(self, request: Request) -> bool:
        """Whether the client may see why the engine failed."""
        return sees_causes(request.headers.get("authorization"), self.settings.host, self.settings.api_keys)

    def check_alive(self, request: Request) -> None:
        """Raises ApiError (503) if the server does not do its work any more."""
        problem = self.state.problem
        if problem is not None:
            shown = problem if self.shows_causes(request) else ENGINE_FAILED
            raise unavailable(shown, "failed", self.settings.retry_after)

    def _check_ready(self, request: Request) -> None:
        state, retry_after = self.state, self.settings.retry_after
        self.check_alive(request)
        if state.draining:
            raise unavailable("the server is shutting down and takes no new requests", "draining", retry_after)
        if state.model is None:
            raise unavailable("the model is being loaded: try again later", "loading", retry_after)

    def take_slot(self) -> Callable[[], None]:
        """Counts a request with a body until the returned function is called. Raises ApiError (429) if there are too many."""
        most = self.settings.max_requests
        if self._requests >= most:
            raise busy(
                f"{most} requests are being answered, the most at once: try again later", self.settings.retry_after
            )
        self._requests += 1
        free = [True]

        def release() -> None:
            if free:
                free.clear()
                self._requests -= 1

        return release

    async def fields(self, request: Request, model: type[AnyBody]) -> AnyBody:
        """The fields of a request's body. Raises ApiError: 415 if it is not declared as JSON, else as `parse`."""
        declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # other types can be posted by any web page that the user of a loopback server visits
        if declared != "application/json":
            raise ApiError(
                415,
                f"content-type {declared[:80]!r}: must be application/json; send this header with a JSON body",
                code="unsupported_media_type",
            )
        body = await request.body()
        if len(body) <= _SMALL_BODY:
            return parse(model, body)
        return await asyncio.to_thread(parse, model, body)  # checking a million token ids takes a tenth of a second


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    found: Service = request.app.state.service
    return found
