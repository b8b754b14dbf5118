"""Buffering of shards in host memory while the disk is slow."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recycle_ds.checkpoint.run import shard_writer
from recycle_ds.checkpoint.run.host_copies import HostCopies
from recycle_ds.checkpoint.run.shard_writer import ShardWriter
from recycle_ds.model.sharding import Piece

ROWS = 100


def piece(number: int) -> Piece:
    return Piece(name=f"t{number}", shape=(ROWS,), axis=0, start=0, length=ROWS, local_start=0)


class SlowDisk:
    """Writes a shard only when a permit is released; counts the shards whose write has started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started, self.permits = 0, threading.Semaphore(0)
        original = shard_writer.save_shard

        def save(path: Path, tensors: Any) -> None:
            self.started += 1
            assert self.permits.acquire(timeout=20)
            original(path, tensors)

        monkeypatch.setattr(shard_writer, "save_shard", save)
        monkeypatch.setattr(shard_writer, "SHARD_BYTES", 4 * ROWS)


def test_the_buffer_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a host from running out of memory because the disk is slower than training: `add` must block."""
    disk = SlowDisk(monkeypatch)
    writer = ShardWriter(tmp_path, 0, limit=2 * 4 * ROWS, copies=HostCopies(torch.device("cpu"), live=True))
    added: list[int] = []

    def fill() -> None:
        for number in range(6):
            writer.add(piece(number), "weight", torch.full((ROWS,), float(number)))
            added.append(number)
        writer.close({"cpu": torch.zeros(3, dtype=torch.uint8)})

    filler = threading.Thread(target=fill)
    filler.start()
    filler.join(0.3)
    assert filler.is_alive() and len(added) == 2, "two shards are buffered, there is no room for the third"
    disk.permits.release()
    while len(added) < 3:
        filler.join(0.01)
    filler.join(0.2)
    assert len(added) == 3
    for _ in range(9):
        disk.permits.release()
    filler.join(20)
    assert writer.wait() is None and writer.ended
    for number in range(6):
        (value,) = load_file(tmp_path / f"shard-00000-{number:03d}.safetensors").values()
        assert torch.equal(value, torch.full((ROWS,), float(number)))
    assert len(json.loads((tmp_path / "part-00000.json").read_text())["files"]) == 7


def test_a_limit_of_zero_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents training from continuing while shards are still in memory with save_buffer_gib=0."""
    disk = SlowDisk(monkeypatch)
    for _ in range(9):
        disk.permits.release()
    writer = ShardWriter(tmp_path, 0, limit=0, copies=HostCopies(torch.device("cpu"), live=True))
    for number in range(3):
        writer.add(piece(number), "weight", torch.zeros(ROWS))
    writer.close({"cpu": torch.zeros(3, dtype=torch.uint8)})
    assert writer.ended


def test_a_disk_error_does_not_block_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents training from waiting forever for a writer that has failed, and losing the error."""
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 4 * ROWS)

    def full(path: Path, tensors: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(shard_writer, "save_shard", full)
    writer = ShardWriter(tmp_path, 0, limit=4 * ROWS, copies=HostCopies(torch.device("cpu"), live=True))
    for number in range(5):
        writer.add(piece(number), "weight", torch.zeros(ROWS))
    writer.close({})
    error = writer.wait()
    assert error is not None and error.startswith("No space left on device")
    assert not list(tmp_path.iterdir())
