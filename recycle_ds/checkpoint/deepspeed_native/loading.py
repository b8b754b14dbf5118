"""Opening the .pt files of a DeepSpeed folder: memory-mapped, with weights_only and a closed list of harmless stand-ins."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.torch_archives import archive_fault, one_line
from recycle_ds.checkpoint.sources import shorten

T = TypeVar("T")
Keys = tuple[str | int, ...]
"""The way to a value through the dictionaries and lists of a file."""

# Mapped pages count as this process's memory once they have been read: files are closed and opened anew after so much. Opening
# costs milliseconds a file, so the files of many ranks stay open for longer.
_MAPPED_BYTES, _MAPPED_BYTES_PER_FILE = 1 << 26, 1 << 20


class Inert:
    """Takes the place of DeepSpeed's objects: nothing reads their content, and no code of theirs runs."""

    def __init__(self, *_: object) -> None:
        """Whatever the file passes is dropped."""


# Every class beyond torch's own that the files of DeepSpeed 0.19 hold.
_KNOWN = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


@dataclass(frozen=True)
class Span:
    """`length` elements from `start` of the flattened tensor at `keys` in a file."""

    file: str
    keys: Keys
    start: int
    length: int


class PtFiles:
    """The .pt files of one folder. They are opened as they are asked for, and closed once much of them has been mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._mapped = 0

    def get(self, file: str, keys: Keys, kind: type[T]) -> T:
        """What lies at `keys` in a file. Raises CheckpointError where nothing or something of another type does."""
        value = self.find(file, keys)
        if not isinstance(value, kind):
            found = "is missing" if value is None else f"is a {type(value).__name__}, not a {kind.__name__}"
            raise CheckpointError(
                f"{self.folder / file}: {'.'.join(str(key) for key in keys) or 'its content'} {found}"
            )
        return value

    def find(self, file: str, keys: Keys) -> Any:
        """The same whatever it is; None where nothing lies there."""
        value = self._tree(file)
        for key in keys:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list | tuple) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return None
        return value

    def read(self, spans: Sequence[Span], start: int, length: int) -> Tensor:
        """[length] elements from `start` of spans laid end to end: a copy, so that the files can be closed.

        Raises CheckpointError where a tensor is shorter than it was found to be.
        """
        parts = []
        for span in spans:
            first, last = max(start, 0), min(start + length, span.length)
            if first < last:
                flat = self.get(span.file, span.keys, Tensor).detach().reshape(-1)
                if flat.numel() < span.start + last:
                    raise CheckpointError(f"{self.folder / span.file}: changed while it was read")
                parts.append(flat[span.start + first : span.start + last])
            start -= span.length
        value = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
        assert value.numel() == length, "spans hold what is asked of them"
        self._mapped += value.nbytes
        if self._mapped > _MAPPED_BYTES + _MAPPED_BYTES_PER_FILE * len(self._open):
            self.close()
        return value

    def close(self) -> None:
        """Unmaps everything; what is asked for next is opened again."""
        self._open.clear()
        self._mapped = 0

    def verify(self, files: Sequence[str]) -> None:
        """Compares the checksums that torch.save wrote with the content. Raises CheckpointError for the first that differ."""
        damaged = [f"{file} ({fault})" for file in files if (fault := archive_fault(self.folder / file))]
        if damaged:
            raise CheckpointError(f"{self.folder}: damaged: {shorten(damaged)}; copy it anew")

    def _tree(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = _load(self.folder / file)
        return self._open[file]


def _load(path: Path) -> Any:
    """The content of a file, its tensors mapped. Raises CheckpointError in one line; no code of the file is ever run."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: cannot be read: it is truncated, damaged, or not a zip file, as torch.save writes them by default"
        )
    try:
        with safe_globals([(Inert, name) for name in _KNOWN]):
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except pickle.UnpicklingError:
                foreign = sorted(get_unsafe_globals_in_checkpoint(str(path)))
    # whatever a damaged file makes of torch's reader, it is the file's fault
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read: it is truncated or damaged ({type(error).__name__}: {one_line(error)})"
        ) from None
    names = shorten([one_line(name) for name in foreign]) or "something that weights do not need"
    raise CheckpointError(f"{path}: holds {names}, which DeepSpeed's own files do not: it was not loaded")
