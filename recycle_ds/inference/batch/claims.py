"""The claim of a job on its parts folder: which checkpoint all its processes and later starts use."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from recycle_ds.inference.batch.parts_record import RECORD, PartsRecord, checkpoint_digest, claim, read_record
from recycle_ds.inference.errors import DecodingError


class Loaded(Protocol):
    """A loaded model."""

    @property
    def path(self) -> Path:
        """The checkpoint that it was loaded from."""


_L = TypeVar("_L", bound=Loaded)


@dataclass(frozen=True)
class Claim:
    """What the processes of a job must agree on. key: SHA-256 of prompts and settings. model: path of --model."""

    parts: Path
    key: str
    model: str

    @property
    def model_path(self) -> str:
        """Absolute path of --model. It may be a run folder, whose newest checkpoint changes."""
        return os.path.abspath(self.model)

    def settle(
        self, load: Callable[[str], _L], is_complete: Callable[[], bool], before_claim: Callable[[], None]
    ) -> _L | None:
        """Loads the model and claims the parts folder. Returns None if the output is already complete.

        If the parts exist, from an earlier start or a faster process, the checkpoint that they were created with is
        loaded; otherwise the one that --model names now, and the parts folder is created, after `before_claim`.

        Raises DecodingError for parts created with other prompts, other settings or a checkpoint that no longer exists.
        """
        record = self.record()
        loaded = load(record.checkpoint if record and record.portable else self.model)
        own = self._record_of(loaded)
        if record is None:
            if is_complete():  # and its parts are removed: they must not be created again
                return None
            before_claim()
            claim(self.parts, own)
            record = self.record()
        if is_complete():  # checked last: the output exists before its parts are removed
            return None
        if record is None:
            raise DecodingError(f"{self.parts}: not a folder of partial outputs; remove it, or name another --output")
        if record.digest != own.digest and record.checkpoint != own.checkpoint and record.portable:
            del loaded  # memory may not suffice for two models
            loaded = load(record.checkpoint)
            own = self._record_of(loaded)
        if record.digest != own.digest:
            raise DecodingError(
                f"{self.parts}: created with the checkpoint {record.checkpoint}, {self._mismatch(record, own)}"
            )
        return loaded

    def record(self) -> PartsRecord | None:
        """The record of the parts, None without parts. Raises DecodingError if the parts do not match this request."""
        record = read_record(self.parts / RECORD)
        if record is None:
            return None
        if record.key != self.key:
            raise DecodingError(
                f"{self.parts}: created with other prompts or settings; remove it, or name another --output"
            )
        if not record.matches(self.key, self.model_path):
            raise DecodingError(
                f"{self.parts}: created with the checkpoint {record.checkpoint}, not with {self.model}: use --model "
                f"{record.checkpoint}, or name another --output"
            )
        if not Path(record.checkpoint).is_dir():
            raise DecodingError(
                f"{self.parts}: created with the checkpoint {record.checkpoint}, which no longer exists: restore it, or "
                f"remove {self.parts} to start over"
            )
        return record

    def _record_of(self, loaded: Loaded) -> PartsRecord:
        return PartsRecord(self.key, self.model_path, os.path.abspath(loaded.path), checkpoint_digest(loaded.path))

    def _mismatch(self, record: PartsRecord, own: PartsRecord) -> str:
        if own.checkpoint == record.checkpoint:
            return (
                f"whose files have changed since, or differ on this host: restore them, or remove {self.parts} to "
                "start over"
            )
        return f"but {self.model} is now {own.checkpoint}: use --model {record.checkpoint}, or name another --output"
