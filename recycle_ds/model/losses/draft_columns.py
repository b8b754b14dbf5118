"""The part of the output head that belongs to a draft vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.data.targets import IGNORE
from recycle_ds.model.losses.chunks import HeadShard


@dataclass(frozen=True)
class DraftColumns:
    """A draft vocabulary, and this rank's rows of the head that are in it."""

    ids: Tensor
    """[M], token ids, ascending."""
    table: Tensor
    """Bool [V]: whether a token is in it."""
    columns: Tensor
    """Those of this rank's rows that are in it, ascending; none on a rank without any."""

    @staticmethod
    def of(ids: Tensor, vocab_size: int, shard: HeadShard) -> DraftColumns:
        """ids: of the whole draft vocabulary, ascending."""
        table = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device)
        table[ids] = True
        return DraftColumns(ids, table, ids[(ids >= shard.first) & (ids < shard.first + shard.valid)] - shard.first)

    def head(self, weight: Tensor, shard: HeadShard) -> tuple[Tensor, HeadShard]:
        """A head of this vocabulary, whose tokens are numbered in the order of `ids`: this rank's rows, and which they are.

        A rank without any has a row of padding."""
        rows = weight[self.columns] if len(self.columns) else weight[:1]
        first = int((self.ids < shard.first).sum())
        return rows, HeadShard(first, len(self.columns), shard.axis, shard.scattered)

    def number(self, targets: Tensor) -> Tensor:
        """Targets as numbers in the order of `ids`; IGNORE outside the vocabulary and where there is no target."""
        number = torch.searchsorted(self.ids, targets.contiguous()).clamp_max(len(self.ids) - 1)
        return number.masked_fill(self.ids[number] != targets, IGNORE)
