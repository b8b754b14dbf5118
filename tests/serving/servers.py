"""A really running server on a tiny model: uvicorn in a thread, with all its limits as settings."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.answers import text_of
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.text_stream import TextStream
from recycle_ds.serving.app import create_app
from recycle_ds.serving.conduct.connections import server_config
from recycle_ds.serving.process.listening import listen
from recycle_ds.serving.settings import ServerSettings
from recycle_ds.serving.state import ServedModel, State
from recycle_ds.serving.worker import Worker
from tests.unit.inference.models import overfitted_model

# Korean, an emoji of four bytes, accents: with a vocabulary of little more than all bytes, most characters are split.
TEXT = "하늘이 맑다. naïve café 🙂 the cat sat on the mat; 고양이가 앉았다! "
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>")
NAME = "tiny"
LONG = {"prompt": TEXT[:10], "max_tokens": 100, "ignore_eos": True}
"""Body of a request for a long answer."""


def make_tokenizer(folder: Path, template: str | None = CHATML) -> Tokenizer:
    """A byte-level tokenizer with chat tokens, in a folder with a chat template."""
    import tokenizers

    trained = tokenizers.Tokenizer.from_str(Tokenizer.train([TEXT, "abcdefghij" * 4], 280).to_json())
    trained.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(trained.to_str(), encoding="utf-8")
    config = {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True}, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.load(folder)


def make_model(folder: Path) -> LoadedModel:
    """A model that has learned TEXT by heart: drafts are accepted, and answers are texts with split characters."""
    tokenizer = make_tokenizer(folder)
    model = overfitted_model(tokenizer.encode(TEXT), tokenizer.vocab_size, stride=7)
    model.unnamed_ids = ()
    return LoadedModel(model, tokenizer, folder, step=0, seq_length=48)


def engine_of(loaded: LoadedModel, **options: Any) -> DecodingEngine:
    """An engine as `serve` builds it."""
    tokenizer = loaded.tokenizer
    options = {"max_batch": 4, "eos_ids": tokenizer.end_ids} | options
    return local_engine(loaded.model, text_source=lambda prompt: TextStream(tokenizer, after=prompt), **options)


def greedy(loaded: LoadedModel, prompt: str, tokens: int, **params: Any) -> tuple[str, list[int]]:
    """The engine's own answer: text and ids."""
    engine, chosen = engine_of(loaded), SamplingParams(max_new_tokens=tokens, **params)
    (sequence,) = engine.add(loaded.tokenizer.encode(prompt), chosen, "autoregressive")
    engine.finish([sequence])
    ids = list(sequence.generation(0.0).token_ids)
    return text_of(loaded.tokenizer, chosen, ids, loaded.tokenizer.encode(prompt)), ids


@dataclass
class Server:
    """A running server. worker: None while the model is not loaded."""

    url: str
    state: State
    log: io.StringIO
    api_key: str
    http_server: uvicorn.Server
    clients: list[openai.OpenAI | httpx.Client] = field(default_factory=list)

    @property
    def worker(self) -> Worker:
        assert self.state.model is not None
        return self.state.model.worker

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=60, **options)
        self.clients.append(made)
        return made

    def http(self, **options: Any) -> httpx.Client:
        """A plain client."""
        headers = {"authorization": f"Bearer {self.api_key}"}
        made = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **options)
        self.clients.append(made)
        return made

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log so far."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def wait_idle(self, seconds: float = 30) -> None:
        """Waits until nothing is being decoded; asserts that no block is lost."""
        until(lambda: self.worker.open == 0, seconds)
        until(lambda: not self.worker.engine.unfinished, seconds)
        assert not self.worker._requests and not self.worker._answers
        self.worker.engine.scheduler.check()
        pool = self.worker.engine.scheduler.pool
        assert pool.free == pool.count


def until(condition: Any, seconds: float = 30) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@contextmanager
def serving(
    loaded: LoadedModel | None,
    *,
    max_queued: int = 64,
    engine: dict[str, Any] | None = None,
    send_buffer: int | None = None,
    **settings: Any,
) -> Iterator[Server]:
    """Runs a server for a model; None for one that is still loading it. send_buffer: bytes that the system keeps of what a
    client does not read; by default megabytes."""
    state, log = State(), io.StringIO()
    worker = None
    if loaded is not None:
        worker = Worker(engine_of(loaded, **(engine or {})), max_queued=max_queued)
        worker.start()
        state.model = ServedModel(loaded, worker)
    chosen = replace(ServerSettings(NAME), **settings)
    listener = listen("127.0.0.1", 0)  # as `serve` does: asyncio sends at once on sockets of this kind only
    port = listener.getsockname()[1]
    if send_buffer is not None:  # connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = uvicorn.Server(server_config(create_app(state, chosen, log=log), lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        running = Server(
            f"http://127.0.0.1:{port}", state, log, chosen.api_keys[0] if chosen.api_keys else "none", server
        )
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [client.close() for client in running.clients])
            yield running
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)
        if worker is not None:
            worker.stop("the test has ended")
            assert worker.join(30)
        assert not thread.is_alive()


def slow_down(server: Server, seconds: float = 0.02) -> None:
    """Lets every step of the engine take longer, so that clients can act in the middle of an answer."""
    engine = server.worker.engine
    step = engine.step

    def slow() -> Any:
        time.sleep(seconds)
        return step()

    engine.step = slow  # type: ignore[method-assign]


def head_of(path: str, length: int) -> bytes:
    """The head of a request with a body of so many bytes."""
    kind = "content-type: application/json\r\n"
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{kind}content-length: {length}\r\n\r\n".encode()
