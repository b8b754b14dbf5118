"""A source whose recycle module takes the backbone's states before its final norm, as vLLM gives them to an MTP head.

With g the weight of the final norm, w that of norm_h and u = x / rms(x) the state before the final norm, normalised:

    ours, after the norm     norm_h(g u) = w g u / rms(g u)
    before the norm          w' u        with w' = w g / rms(g)

They differ by rms(g u) / rms(g), one number per token near 1, and not at all if g is constant. From the second draft
on, a head is fed its own states, for which w' has a factor of g / rms(g) too much. Only drafts change, not the text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.huggingface.mimo import HIDDEN_NORM
from recycle_ds.checkpoint.sources import Source


class BeforeNorm:
    """See `Source`: the given source with w' in place of w, in the dtype of w."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.kind, self.folder, self.model, self.step = source.kind, source.folder, source.model, source.step
        self.seq_length, self.tokenizer, self.recycle = source.seq_length, source.tokenizer, source.recycle
        self.shapes: Mapping[str, tuple[int, ...]] = source.shapes
        self.notes = source.notes

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """See `Source`."""
        self._source.verify(rank, world_size)

    def has(self, name: str, kind: str) -> bool:
        """See `Source`."""
        return self._source.has(name, kind)

    def dtype(self, name: str) -> torch.dtype:
        """See `Source`."""
        return self._source.dtype(name)

    def read(self, name: str, kind: str = "weight", axis: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """See `Source`. Raises CheckpointError if the final norm's weight is zero, or not finite."""
        value = self._source.read(name, kind, axis, start, length)
        if (name, kind) != (HIDDEN_NORM, "weight"):
            return value
        norm = self._source.read("final_norm.weight").float()
        scale = norm.square().mean().sqrt()
        if not (scale > 0 and scale.isfinite()):
            raise CheckpointError(f"{self.folder}: final_norm.weight has an rms of {scale}: omit --before-norm")
        part = norm.narrow(0, start, value.shape[0])
        return (value.float() * part / scale).to(value.dtype)
