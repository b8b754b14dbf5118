"""A rank's share of a checkpoint, copied to host memory and written by a thread of its own while training goes on."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from recycle_ds.checkpoint.files.checksums import FileEntry, describe, save_shard, write_json
from recycle_ds.model.sharding import Piece

SHARD_BYTES = 2**30
_Job = tuple[str, dict[str, Tensor], int]


class ShardWriter:
    """Collects tensors in files of about SHARD_BYTES.

    At most `limit` bytes of full shards wait for the disk: `add` waits for room then, and `close` too if `limit` is 0.
    """

    def __init__(self, folder: Path, rank: int, limit: int) -> None:
        self._folder, self._rank, self._limit = folder, rank, limit
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards = 0
        self._slices: list[dict[str, Any]] = []
        self._files: dict[str, FileEntry] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._waiting = 0
        self._fault: str | None = None
        self._bug: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def add(self, piece: Piece, kind: str, value: Tensor) -> None:
        """Copies a piece of a local parameter to the host."""
        part = value.narrow(piece.axis, piece.local_start, piece.length)
        key = f"{piece.name}/{kind}/{piece.start}"
        self._pending[key] = part.detach().to("cpu", copy=True).contiguous()
        self._bytes += part.numel() * part.element_size()
        where = {"kind": kind, "file": self._name(), "key": key, "axis": piece.axis, "start": piece.start}
        self._slices.append({"name": piece.name, "shape": list(piece.shape), **where, "length": piece.length})
        if self._bytes >= SHARD_BYTES:
            self._submit()

    def close(self, generators: dict[str, Tensor]) -> None:
        """Hands over what is left and the random generators' states; nothing can be added any more."""
        if self._pending:
            self._submit()
        self._jobs.put((f"rng-{self._rank:05d}.safetensors", generators, 0))
        self._jobs.put(None)
        if self._limit == 0:
            self._thread.join()

    @property
    def ended(self) -> bool:
        """Whether everything is on disk, or has failed."""
        return not self._thread.is_alive()

    def wait(self) -> str | None:
        """Waits for the end; the fault of the disk, or None."""
        self._thread.join()
        if self._bug is not None:
            raise self._bug
        return self._fault

    def _name(self) -> str:
        return f"shard-{self._rank:05d}-{self._shards:03d}.safetensors"

    def _submit(self) -> None:
        size = self._bytes
        with self._room:
            self._room.wait_for(lambda: self._waiting == 0 or self._waiting + size <= self._limit)
            self._waiting += size
        self._jobs.put((self._name(), self._pending, size))
        self._pending, self._bytes = {}, 0
        self._shards += 1

    def _run(self) -> None:
        """The thread. After a fault it only takes what comes, so that nobody waits for room."""
        while (job := self._jobs.get()) is not None:
            name, tensors, size = job
            if self._fault is None and self._bug is None:
                self._guard(lambda n=name, t=tensors: self._write(n, t))
            del job, tensors
            with self._room:
                self._waiting -= size
                self._room.notify_all()
        if self._fault is None and self._bug is None:
            files = {name: entry.model_dump() for name, entry in self._files.items()}
            path = self._folder / f"part-{self._rank:05d}.json"
            self._guard(lambda: write_json(path, {"slices": self._slices, "files": files}))

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self._folder / name
        save_shard(path, tensors)
        self._files[name] = describe(path)

    def _guard(self, action: Any) -> None:
        try:
            self._fault = disk_fault(action)
        except BaseException as error:  # told to the rank's own thread, which raises it
            self._bug = error


def disk_fault(action: Any) -> str | None:
    """Runs what touches the disk; its fault, where there is one, is returned to be told to the other ranks."""
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    except SafetensorError as error:  # the library wraps the disk's errors in its own
        return str(error)
    return None
