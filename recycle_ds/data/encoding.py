"""Tokenises documents in several processes: ordered results, bounded memory, no orphaned workers.

Each worker has its own pipe and processes one chunk at a time. The process pools of the standard library share one queue;
on Python 3.10 they can hang when a worker is killed while reading from it.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.chat import RenderedChat, encode_chat
from recycle_ds.data.token_files import token_dtype
from recycle_ds.data.tokenizer import Tokenizer

_CHUNK_CHARACTERS = 1 << 18  # text per chunk: amortises the cost of sending, uses little memory
_CHUNK_DOCUMENTS = 1024
_AHEAD = 4  # maximum chunks per worker sent and not yet yielded
_STARTING = -1  # in place of a chunk number, until the worker reports that it has started

Ids = NDArray[Any]
"""[tokens] ids of one document, of the type that `token_dtype` names."""


@dataclass
class SpecialTokenCounts:
    """Special tokens that are written in documents."""

    documents: int = 0
    """Documents with at least one."""
    tokens: Counter[str] = field(default_factory=Counter)
    """How often each is written."""

    def add(self, other: SpecialTokenCounts) -> None:
        self.documents += other.documents
        self.tokens.update(other.tokens)


def encode_in_order(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    workers: int,
    *,
    parse_special: bool = False,
    counts: SpecialTokenCounts | None = None,
) -> Generator[Ids, None, None]:
    """Yield the ids of each text, in the order of the texts; a text without tokens gives an empty array.

    If the generator is not exhausted, close it to terminate its workers.

    Args:
        texts: documents, read slightly ahead of the yielded results. The special tokens of a `RenderedChat` stand for
            themselves; an end of the document at its end is dropped, because token files add one to every document.
        tokenizer: copied into the workers.
        workers: processes; with 1, or with little text, this process tokenises.
        parse_special: whether special tokens that are written in a text stand for themselves; else they are text.
        counts: incremented for special tokens that are written in texts (of a chat: in its messages).

    Raises:
        DataError: a text cannot be encoded, or a worker died.
    """
    counts = counts if counts is not None else SpecialTokenCounts()
    chunks = _chunks(texts)
    first = list(itertools.islice(chunks, 2 if workers > 1 else 0))
    chunks = itertools.chain(first, chunks)
    if len(first) < 2:
        for chunk in chunks:
            ids, found = _encode(tokenizer, chunk, parse_special)
            counts.add(found)
            yield from ids
        return
    pool = _WorkerPool(tokenizer, workers, parse_special, counts)
    try:
        yield from pool.encode(chunks)
    finally:
        pool.terminate()


def usable_cores() -> int:
    """Number of cores that this process may use: those of its job, not of the machine."""
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


def _encode(tokenizer: Tokenizer, texts: list[str], parse_special: bool) -> tuple[list[Ids], SpecialTokenCounts]:
    dtype = token_dtype(tokenizer.vocab_size)
    counts = SpecialTokenCounts()
    return [np.array(_ids(tokenizer, text, parse_special, counts), dtype=dtype) for text in texts], counts


def _ids(tokenizer: Tokenizer, text: str, parse_special: bool, counts: SpecialTokenCounts) -> list[int]:
    if not text.strip():
        return []
    written = text.parts[::2] if isinstance(text, RenderedChat) else (text,)
    found = [token for part in written for token in tokenizer.special_pattern.findall(part)]
    counts.documents += bool(found)
    counts.tokens.update(found)
    if not isinstance(text, RenderedChat):
        return tokenizer.encode(text, parse_special=parse_special)
    ids = tokenizer.encode(text) if parse_special else encode_chat(tokenizer, text)
    return ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids


class _WorkerPool:
    """The worker processes and the chunk that each of them is processing."""

    def __init__(self, tokenizer: Tokenizer, workers: int, parse_special: bool, counts: SpecialTokenCounts) -> None:
        # Spawned, not forked: the caller may have threads and locks (of the tokenizers library, torch, a launcher).
        context = multiprocessing.get_context("spawn")
        self._processes: list[SpawnProcess] = []
        self._busy: dict[Connection, int] = {}  # number of the current chunk
        self._idle: list[Connection] = []
        self._counts = counts
        # multiprocessing starts this helper with the first worker and unblocks the stop signals afterwards: the workers would
        # not inherit the mask, and each would answer Ctrl-C with its own traceback
        resource_tracker.ensure_running()
        with _stop_signals_blocked():
            for _ in range(workers):
                parent_end, worker_end = context.Pipe()
                process = context.Process(target=_run_worker, args=(worker_end, tokenizer, parse_special), daemon=True)
                process.start()
                worker_end.close()  # so that the pipe is closed when the worker exits
                self._processes.append(process)
                self._busy[parent_end] = _STARTING

    def encode(self, chunks: Iterator[list[str]]) -> Iterator[Ids]:
        """Send chunks to idle workers; yield the documents' ids in order."""
        done: dict[int, list[Ids]] = {}
        sent = yielded = 0
        more = True
        while more or sent > yielded:
            while more and self._idle and sent - yielded < _AHEAD * len(self._processes):
                chunk = next(chunks, None)
                if chunk is None:
                    more = False
                else:
                    self._send(sent, chunk)
                    sent += 1
            if yielded in done:
                yield from done.pop(yielded)
                yielded += 1
            elif self._busy:
                done.update(self._results())

    def terminate(self) -> None:
        """Kill all workers. They have no state that could be lost."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in (*self._busy, *self._idle):
            connection.close()

    def _send(self, number: int, chunk: list[str]) -> None:
        connection = self._idle.pop()
        self._busy[connection] = number
        try:
            connection.send(chunk)
        except OSError as error:
            raise self._worker_died() from error

    def _results(self) -> dict[int, list[Ids]]:
        """Wait for at least one worker and return the finished chunks; a worker that has just started gives none."""
        found = {}
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except (EOFError, OSError) as error:
                raise self._worker_died() from error
            if isinstance(result, DataError):
                raise result
            number = self._busy.pop(connection)
            self._idle.append(connection)
            if number != _STARTING:
                found[number], counts = result
                self._counts.add(counts)
        return found

    def _worker_died(self) -> DataError:
        return DataError(
            "a tokenising process died unexpectedly, possibly out of memory; "
            f"try fewer workers than {len(self._processes)}"
        )


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM while workers start. Workers inherit the mask, so only this process handles the signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_worker(connection: Connection, tokenizer: Tokenizer, parse_special: bool) -> None:
    """Main function of a worker: reports its start, then encodes chunks of texts until the pipe is closed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has exited: the results are not needed
        connection.send([])
        while True:
            chunk = connection.recv()
            try:
                result: tuple[list[Ids], SpecialTokenCounts] | DataError = _encode(tokenizer, chunk, parse_special)
            except DataError as error:
                result = error
            connection.send(result)
