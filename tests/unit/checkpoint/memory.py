"""A model in memory as a source of weights."""

from __future__ import annotations

from pathlib import Path

import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model import RecycleGPT
from recycle_ds.model.sharding import canonical_shapes, pieces
from recycle_ds.parallel.mesh import Mesh


class ModelSource:
    """See `recycle_ds.checkpoint.sources.Source`."""

    kind, step, seq_length = "memory", 7, 16
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, model: RecycleGPT, config: ModelConfig, recycle: RecycleConfig, folder: Path) -> None:
        self.model, self.recycle, self.folder = config, recycle, folder
        table = pieces(model, Mesh())
        self.shapes = canonical_shapes(table)
        self._values = {
            piece.name: model.get_parameter(name).detach().narrow(piece.axis, piece.local_start, piece.length)
            for name, row in table.items()
            for piece in row
        }

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        pass

    def has(self, name: str, kind: str) -> bool:
        return kind == "weight"

    def dtype(self, name: str) -> torch.dtype:
        return self._values[name].dtype

    def read(
        self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None
    ) -> torch.Tensor:
        value = self._values[name]
        return value.narrow(axis, start, value.shape[axis] - start if length is None else length)
