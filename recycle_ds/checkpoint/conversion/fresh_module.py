"""A source with a newly initialised recycle module added, for sources without one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config import RecycleConfig
from recycle_ds.model.build import whole_shapes
from recycle_ds.model.initialisation import initial_tensor

_PART = "recycle."


class FreshModule:
    """See `Source`. The backbone is the source's; the module's tensors are the initial ones of a run with this seed.

    They are generated when they are read, one at a time, and rounded to the dtype of the source's first tensor.
    """

    def __init__(self, source: Source, recycle: RecycleConfig, seed: int) -> None:
        """Raises CheckpointError if the source has a recycle module."""
        if source.recycle.layers:
            raise CheckpointError(
                f"{source.folder}: already has a recycle module of {source.recycle.layers} layer(s): omit --recycle-layers "
                f"{recycle.layers}"
            )
        self._source, self._seed = source, seed
        self.kind, self.folder, self.model, self.step = source.kind, source.folder, source.model, source.step
        self.seq_length, self.tokenizer = source.seq_length, source.tokenizer
        self.recycle = recycle
        initial_shapes = {
            name: shape for name, shape in whole_shapes(self.model, recycle).items() if name.startswith(_PART)
        }
        self.shapes: Mapping[str, tuple[int, ...]] = {**source.shapes, **initial_shapes}
        self._dtype = source.dtype(next(iter(source.shapes)))
        self.notes: tuple[str, ...] = (
            *source.notes,
            f"recycle module of {recycle.layers} layer(s) initialised with seed {seed}: it must be trained before use",
        )

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """See `Source`."""
        self._source.verify(rank, world_size)

    def has(self, name: str, kind: str) -> bool:
        """See `Source`."""
        return kind == "weight" if name.startswith(_PART) else self._source.has(name, kind)

    def dtype(self, name: str) -> torch.dtype:
        """See `Source`."""
        return self._dtype if name.startswith(_PART) else self._source.dtype(name)

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """See `Source`."""
        if not name.startswith(_PART):
            return self._source.read(name, kind, axis, start, length)
        if not self.has(name, kind):
            raise CheckpointError(f"{self.folder}: no {kind} of {name}")
        shape = self.shapes[name]
        value = initial_tensor(name, shape, self.model, self._seed).to(self._dtype)
        return value.narrow(axis, start, shape[axis] - start if length is None else length).contiguous()
