"""A rank's share of a checkpoint: copied to host memory, and written by a background thread while training continues."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from recycle_ds.checkpoint.files.checksums import FileEntry, describe
from recycle_ds.checkpoint.files.safetensors_writer import save_shard
from recycle_ds.checkpoint.run.host_copies import HostCopies
from recycle_ds.config.atomic_files import write_json_atomically
from recycle_ds.model.sharding import Piece

SHARD_BYTES = 2**30
_Write = tuple[str, dict[str, Tensor], int, Callable[[], None]]


class ShardWriter:
    """Collects tensors into files of about SHARD_BYTES each and writes them in a background thread.

    At most `limit` bytes of full shards are buffered; `add` blocks until there is room. If `limit` is 0, `close` blocks until
    everything is written. copies: make the copies in host memory, which may be incomplete until the thread writes them.
    """

    def __init__(self, folder: Path, rank: int, limit: int, copies: HostCopies) -> None:
        self._folder, self._rank, self._limit, self._copies = folder, rank, limit, copies
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards = 0
        self._slices: list[dict[str, Any]] = []
        self._files: dict[str, FileEntry] = {}
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._has_room = threading.Condition()
        self._buffered = 0
        self._disk_error: str | None = None
        self._exception: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def add(self, piece: Piece, kind: str, value: Tensor) -> None:
        """Copies a piece of a local parameter to host memory. Blocks while the buffer is full."""
        part = value.narrow(piece.axis, piece.local_start, piece.length)
        key = f"{piece.name}/{kind}/{piece.start}"
        self._pending[key] = self._copies.copy(part)
        self._bytes += part.numel() * part.element_size()
        where = {"kind": kind, "file": self._file_name(), "key": key, "axis": piece.axis, "start": piece.start}
        self._slices.append({"name": piece.name, "shape": list(piece.shape), **where, "length": piece.length})
        if self._bytes >= SHARD_BYTES:
            self._submit()

    def close(self, generators: dict[str, Tensor]) -> None:
        """Queues the remaining tensors and the random generators' states. Nothing can be added afterwards."""
        if self._pending:
            self._submit()
        self._queue.put((f"rng-{self._rank:05d}.safetensors", generators, 0, self._copies.completion()))
        self._queue.put(None)
        if self._limit == 0:
            self._thread.join()

    @property
    def ended(self) -> bool:
        """Whether everything is on disk, or writing has failed."""
        return not self._thread.is_alive()

    def wait(self) -> str | None:
        """Waits for the writer thread. Returns its disk error, or None; raises any other exception it had."""
        self._thread.join()
        if self._exception is not None:
            raise self._exception
        return self._disk_error

    def _file_name(self) -> str:
        return f"shard-{self._rank:05d}-{self._shards:03d}.safetensors"

    def _submit(self) -> None:
        size = self._bytes
        with self._has_room:
            self._has_room.wait_for(lambda: self._buffered == 0 or self._buffered + size <= self._limit)
            self._buffered += size
        self._queue.put((self._file_name(), self._pending, size, self._copies.completion()))
        self._pending, self._bytes = {}, 0
        self._shards += 1

    def _run(self) -> None:
        """The writer thread. After an error it discards what is queued, so that `add` does not block forever."""
        while (task := self._queue.get()) is not None:
            name, tensors, size, wait = task
            if self._disk_error is None and self._exception is None:
                self._guard(lambda n=name, t=tensors, w=wait: self._write(n, t, w))
            del task, tensors
            with self._has_room:
                self._buffered -= size
                self._has_room.notify_all()
        if self._disk_error is None and self._exception is None:
            files = {name: entry.model_dump() for name, entry in self._files.items()}
            path = self._folder / f"part-{self._rank:05d}.json"
            self._guard(lambda: write_json_atomically(path, {"slices": self._slices, "files": files}))

    def _write(self, name: str, tensors: dict[str, Tensor], wait: Callable[[], None]) -> None:
        wait()
        path = self._folder / name
        save_shard(path, tensors)
        self._files[name] = describe(path)

    def _guard(self, action: Any) -> None:
        try:
            self._disk_error = disk_error(action)
        except BaseException as error:  # `wait` raises it in the main thread
            self._exception = error


def disk_error(action: Any) -> str | None:
    """Runs an action that writes to the disk. Returns its error as text, to be shared with the other ranks, or None."""
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    except SafetensorError as error:  # safetensors wraps OS errors in its own exception
        return str(error)
    return None
