"""Reading parts of tensors from memory-mapped safetensors files, with errors reported in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class ShardFiles:
    """The safetensors files of a folder. Each is opened on first use and stays open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def keys(self, file: str) -> list[str]:
        """Names of the tensors in a file."""
        return list(self._handle(file).keys())

    def shape(self, file: str, key: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""
        return tuple(self._part(file, key).get_shape())

    def dtype(self, file: str, key: str) -> torch.dtype:
        """Dtype of a stored tensor. Raises CheckpointError for a dtype that weights cannot have."""
        name = self._part(file, key).get_dtype()
        if name not in DTYPES:
            raise CheckpointError(f"{self.folder / file}: {key} has dtype {name}; weights must be {', '.join(DTYPES)}")
        return DTYPES[name]

    def read(self, file: str, key: str, axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """Slice [start, start + length) along `axis`; if its bytes are contiguous, no others are read."""
        part = self._part(file, key)
        shape = part.get_shape()
        index = [slice(None)] * len(shape)
        index[axis] = slice(start, shape[axis] if length is None else start + length)
        try:
            value: Tensor = part[tuple(index)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {key}: {error}") from None
        return value

    def _part(self, file: str, key: str) -> Any:
        try:
            return self._handle(file).get_slice(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {key}: {error}") from None

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(str(self.folder / file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read ({error})") from None
        return self._open[file]
