"""Tokenising documents on several processes: results in order, bounded memory, no worker outlives the job."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recycle_ds.data.errors import DataError
from recycle_ds.data.token_files import token_dtype
from recycle_ds.data.tokenizer import Tokenizer

_CHUNK_CHARACTERS = 1 << 18  # text handed to a worker at once: much against the cost of handing over, little in memory
_CHUNK_DOCUMENTS = 1024
_CHUNKS_PER_WORKER = 3  # chunks read ahead for each worker

Ids = NDArray[Any]
"""[tokens] ids of one document, of the type that `token_dtype` names."""


def encode_in_order(texts: Iterable[str], tokenizer: Tokenizer, workers: int) -> Generator[Ids, None, None]:
    """Yield the ids of each text, in the order of the texts; texts without any token give an empty array.

    Close the generator when leaving it early: its workers end with it.

    Args:
        texts: documents, read a little ahead of what is yielded.
        tokenizer: copied into the workers.
        workers: processes; 1 tokenises in this one.

    Raises:
        DataError: a text cannot be encoded, or a worker died.
    """
    chunks = _chunks(texts)
    if workers == 1:
        for chunk in chunks:
            yield from _encode(tokenizer, chunk)
        return
    # Spawned, not forked: the caller may hold threads and locks (of the tokenizers library, of torch, of a launcher).
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.to_json(), tokenizer.config, tokenizer.name),
    )
    ahead: deque[Future[list[Ids]]] = deque()
    try:
        for chunk in chunks:
            with _interrupts_held():
                ahead.append(pool.submit(_work, chunk))
            if len(ahead) > workers * _CHUNKS_PER_WORKER:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a tokenising process ended abruptly, perhaps for want of memory; try fewer workers than {workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C while a worker may be started: workers inherit the block and so leave Ctrl-C to this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """What a worker process keeps between chunks."""

    tokenizer: Tokenizer


def _start_worker(tokenizer_json: str, config: dict[str, Any], name: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _Worker.tokenizer = Tokenizer(tokenizer_json, config, name=name)


def _end_with(sentinel: int) -> None:
    """Leave at once when the parent is gone, killed before it could say so."""
    wait([sentinel])
    os._exit(1)


def _work(texts: list[str]) -> list[Ids]:
    return _encode(_Worker.tokenizer, texts)
