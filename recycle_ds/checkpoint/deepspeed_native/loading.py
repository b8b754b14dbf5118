"""Opens the .pt files of a DeepSpeed folder: memory-mapped, with weights_only and a fixed list of inert placeholder classes."""

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
"""Path to a value through the nested dictionaries and lists of a file."""

# Mapped pages count as memory of this process once they have been read, so files are closed and reopened after this many bytes.
# Opening takes milliseconds per file, so the limit grows with the number of open files.
_MAPPED_BYTES, _MAPPED_BYTES_PER_FILE = 1 << 26, 1 << 20


class Inert:
    """Placeholder for DeepSpeed's objects: their content is never used, and none of their code runs."""

    def __init__(self, *_: object) -> None:
        """Ignores the arguments from the file."""


# All classes outside torch that the files of DeepSpeed 0.19 contain.
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
    """The .pt files of one folder. They are opened on first use, and closed once enough of them has been mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._mapped = 0

    def get(self, file: str, keys: Keys, kind: type[T]) -> T:
        """Returns the value at `keys` in a file. Raises CheckpointError if it is missing or of another type."""
        value = self.find(file, keys)
        if not isinstance(value, kind):
            found = "is missing" if value is None else f"is a {type(value).__name__}, not a {kind.__name__}"
            raise CheckpointError(
                f"{self.folder / file}: {'.'.join(str(key) for key in keys) or 'the content'} {found}"
            )
        return value

    def find(self, file: str, keys: Keys) -> Any:
        """Returns the value at `keys` in a file, of any type; None if there is none."""
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
        """Returns [length] elements from `start` of the concatenated spans, as a copy, so that the files can be closed.

        Raises CheckpointError if a tensor is shorter than when it was located.
        """
        parts = []
        for span in spans:
            first, last = max(start, 0), min(start + length, span.length)
            if first < last:
                flat = self.get(span.file, span.keys, Tensor).detach().reshape(-1)
                if flat.numel() < span.start + last:
                    raise CheckpointError(f"{self.folder / span.file}: changed while it was being read")
                parts.append(flat[span.start + first : span.start + last])
            start -= span.length
        value = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
        assert value.numel() == length, "the spans cover the requested range"
        self._mapped += value.nbytes
        if self._mapped > _MAPPED_BYTES + _MAPPED_BYTES_PER_FILE * len(self._open):
            self.close()
        return value

    def close(self) -> None:
        """Unmaps all files; they are reopened when needed."""
        self._open.clear()
        self._mapped = 0

    def verify(self, files: Sequence[str]) -> None:
        """Compares the content with the checksums that torch.save wrote. Raises CheckpointError that names damaged files."""
        damaged = [f"{file} ({fault})" for file in files if (fault := archive_fault(self.folder / file))]
        if damaged:
            raise CheckpointError(f"{self.folder}: damaged: {shorten(damaged)}; copy them again")

    def _tree(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = _load(self.folder / file)
        return self._open[file]


def _load(path: Path) -> Any:
    """Returns the content of a file, with mapped tensors. Never runs code from the file. Raises a one-line CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: cannot be read: it is truncated, damaged, or not a zip archive (the default of torch.save)"
        )
    try:
        with safe_globals([(Inert, name) for name in _KNOWN]):
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except pickle.UnpicklingError:
                unknown_classes = sorted(get_unsafe_globals_in_checkpoint(str(path)))
    # a damaged file can make torch's reader raise any exception
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read: it is truncated or damaged ({type(error).__name__}: {one_line(error)})"
        ) from None
    names = shorten([one_line(name) for name in unknown_classes]) or "objects that weights do not need"
    raise CheckpointError(f"{path}: contains {names}, which DeepSpeed does not save: the file was not loaded")
