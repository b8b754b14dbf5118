"""Reductions over a vocabulary that may be split over tensor ranks: tokens are chosen without gathering logits.

Shapes: R rows, V token ids of this rank's shard, N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """Collectives over the ranks that hold a shard each; see `engine.collectives`."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks. May change x."""

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks [ranks, ...]."""


@dataclass(frozen=True)
class Vocabulary:
    """This rank's token ids (at least one): `first` to `first + count - 1`, or those of `selected`. Every method but `ids` and
    `local` is collective over the ranks."""

    first: int
    count: int
    ranks: Ranks | None = None
    """The ranks that hold the other shards; None if this one has the complete vocabulary."""
    selected: Tensor | None = None
    """The shard's `count` ids in ascending order [V], int64, if they are not consecutive."""

    def ids(self, device: torch.device) -> Tensor:
        """The token ids of the shard [V]."""
        if self.selected is not None:
            return self.selected
        return torch.arange(self.first, self.first + self.count, device=device)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where token ids are in the shard: indices, and whether they are in it at all. Both have the shape of `ids`."""
        if self.selected is None:
            index = ids - self.first
            return index.clamp(0, self.count - 1), (index >= 0) & (index < self.count)
        index = torch.searchsorted(self.selected, ids).clamp_max(self.count - 1)
        return index, self.selected[index] == ids

    def _global(self, local: Tensor) -> Tensor:
        """The token ids at indices of the shard."""
        return local + self.first if self.selected is None else self.selected[local]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all shards of a per-shard value."""
        return values if self.ranks is None else self.ranks.sum(values.clone())

    def max(self, values: Tensor) -> Tensor:
        """The maximum over all shards of a per-shard value."""
        return values if self.ranks is None else self.ranks.gather(values).amax(0)

    def argmax(self, scores_RV: Tensor) -> Tensor:
        """The id of the highest score of each row [R], int64; among equal ones the lowest."""
        if scores_RV.device.type == "cpu":  # NumPy's is vectorised: a tenth of PyTorch's time
            local_R = torch.from_numpy(scores_RV.numpy().argmax(-1))
            best_R = scores_RV.gather(-1, local_R[:, None])[:, 0]
        else:
            best_R, local_R = scores_RV.max(-1)
        ids_R = self._global(local_R)
        if self.ranks is None:
            return ids_R
        pairs = self.ranks.gather(torch.stack((best_R.double(), ids_R.double())))  # ids are exact in fp64
        winner_R = pairs[:, 0].argmax(0)
        return pairs[:, 1].gather(0, winner_R[None])[0].long()

    def largest(self, values_RV: Tensor, count: int) -> Tensor:
        """The `count` largest values of each row over all shards [R, N], in descending order; fewer in a smaller vocabulary."""
        own_RN = values_RV.topk(min(count, self.count), dim=-1).values
        if self.ranks is None:
            return own_RN
        room = own_RN.new_full((len(own_RN), count), -torch.inf)
        room[:, : own_RN.shape[1]] = own_RN
        return torch.cat(list(self.ranks.gather(room)), dim=-1).topk(count, dim=-1).values

    def likeliest(self, logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` highest logits of each row over all shards and their ids, [R, N] each."""
        values_RN, local_RN = logits_RV.topk(min(count, self.count), dim=-1)
        ids_RN = self._global(local_RN)
        if self.ranks is None:
            return values_RN, ids_RN
        room = values_RN.new_full((2, len(values_RN), count), -torch.inf, dtype=torch.float64)
        room[0, :, : values_RN.shape[1]], room[1, :, : ids_RN.shape[1]] = values_RN.double(), ids_RN.double()
        everyone = self.ranks.gather(room)
        values, ids = torch.cat(list(everyone[:, 0]), -1), torch.cat(list(everyone[:, 1]), -1)
        best, index = values.topk(count, dim=-1)
        return best.to(logits_RV.dtype), ids.gather(-1, index).long()

    def at(self, values_RV: Tensor, ids_R: Tensor) -> Tensor:
        """The value of one token id in each row [R], whichever shard it is on."""
        local_R, own_R = self.local(ids_R)
        found_R = values_RV.gather(-1, local_R[:, None])[:, 0]
        return self.sum(torch.where(own_R, found_R, torch.zeros_like(found_R)))

    def softmax(self, logits_RV: Tensor) -> Tensor:
        """Probabilities of the shard's tokens [R, V]; they sum to 1 over all shards."""
        if self.ranks is None:
            return logits_RV.softmax(-1)
        exponents_RV = (logits_RV - self.max(logits_RV.amax(-1))[:, None]).exp()
        return exponents_RV / self.sum(exponents_RV.sum(-1))[:, None]

    def logsumexp(self, logits_RV: Tensor) -> Tensor:
        """Logarithm of the sum of exponentials over all shards [R]."""
        if self.ranks is None:
            return logits_RV.logsumexp(-1)
        highest_R = self.max(logits_RV.amax(-1))
        return self.sum((logits_RV - highest_R[:, None]).exp().sum(-1)).log() + highest_R
