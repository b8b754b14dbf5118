"""Tokenising documents on several processes: results in order, bounded memory, no worker outlives the job.

Each worker has a pipe of its own and at most one chunk in hand. The pools of the standard library share one queue, on
which they can wait for ever, on Python 3.10, when a worker is killed while reading from it.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recycle_ds.data.errors import DataError
from recycle_ds.data.token_files import token_dtype
from recycle_ds.data.tokenizer import Tokenizer

_CHUNK_CHARACTERS = 1 << 18  # text handed to a worker at once: much against the cost of handing over, little in memory
_CHUNK_DOCUMENTS = 1024
_AHEAD = 4  # chunks per worker that may be done before the oldest one is
_STARTING = -1  # what a worker is busy with before its first chunk

Ids = NDArray[Any]
"""[tokens] ids of one document, of the type that `token_dtype` names."""


def encode_in_order(texts: Iterable[str], tokenizer: Tokenizer, workers: int) -> Generator[Ids, None, None]:
    """Yield the ids of each text, in the order of the texts; texts without any token give an empty array.

    Close the generator when leaving it early: its workers end with it.

    Args:
        texts: documents, read a little ahead of what is yielded.
        tokenizer: copied into the workers.
        workers: processes; with 1, or if there is little to do, this process tokenises.

    Raises:
        DataError: a text cannot be encoded, or a worker died.
    """
    chunks = _chunks(texts)
    first = list(itertools.islice(chunks, 2 if workers > 1 else 0))
    chunks = itertools.chain(first, chunks)
    if len(first) < 2:
        for chunk in chunks:
            yield from _encode(tokenizer, chunk)
        return
    crew = _Crew(tokenizer, workers)
    try:
        yield from crew.work(chunks)
    finally:
        crew.end()


def usable_cores() -> int:
    """Cores that this process may run on: those of its job, not of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    dtype = token_dtype(tokenizer.vocab_size)
    return [np.array(tokenizer.encode(text) if text.strip() else [], dtype=dtype) for text in texts]


class _Crew:
    """The worker processes and what each of them is busy with."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        # Spawned, not forked: the caller may hold threads and locks (of the tokenizers library, torch, a launcher).
        context = multiprocessing.get_context("spawn")
        self._processes: list[SpawnProcess] = []
        self._busy: dict[Connection, int] = {}  # number of the chunk in hand
        self._idle: list[Connection] = []
        copy = (tokenizer.to_json(), tokenizer.config, tokenizer.name)
        with _interrupts_held():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, *copy), daemon=True)
                process.start()
                theirs.close()  # so that the pipe ends when the worker does
                self._processes.append(process)
                self._busy[ours] = _STARTING

    def work(self, chunks: Iterator[list[str]]) -> Iterator[Ids]:
        """Encode chunks wherever a worker is free; yield the documents' ids in order."""
        done: dict[int, list[Ids]] = {}
        given = yielded = 0
        more = True
        while more or given > yielded:
            while more and self._idle and given - yielded < _AHEAD * len(self._processes):
                chunk = next(chunks, None)
                if chunk is None:
                    more = False
                else:
                    self._give(given, chunk)
                    given += 1
            if yielded in done:
                yield from done.pop(yielded)
                yielded += 1
            elif self._busy:
                done.update(self._results())

    def end(self) -> None:
        """Stop all workers, whatever they are at: they hold nothing that would be missed."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in (*self._busy, *self._idle):
            connection.close()

    def _give(self, number: int, chunk: list[str]) -> None:
        connection = self._idle.pop()
        self._busy[connection] = number
        try:
            connection.send(chunk)
        except OSError as error:
            raise self._died() from error

    def _results(self) -> dict[int, list[Ids]]:
        """Chunks that workers have finished, at least one worker's; none from those that have just started."""
        found = {}
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except (EOFError, OSError) as error:
                raise self._died() from error
            if isinstance(result, DataError):
                raise result
            number = self._busy.pop(connection)
            self._idle.append(connection)
            if number != _STARTING:
                found[number] = result
        return found

    def _died(self) -> DataError:
        return DataError(
            "a tokenising process ended abruptly, perhaps for want of memory; "
            f"try fewer workers than {len(self._processes)}"
        )


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay requests to stop while workers are started: they inherit the block and so leave them to this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, tokenizer_json: str, config: dict[str, Any], name: str) -> None:
    """A worker: announces itself, then answers chunks of texts with their ids until the pipe ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = Tokenizer(tokenizer_json, config, name=name)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone: nobody wants the results
        connection.send([])
        while True:
            chunk = connection.recv()
            try:
                result: list[Ids] | DataError = _encode(tokenizer, chunk)
            except DataError as error:
                result = error
            connection.send(result)
