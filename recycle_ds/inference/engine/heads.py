"""Output heads of this rank: of the whole vocabulary, and of the drafts. Shapes: R rows, V token ids of this rank."""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ds.inference.engine.device.products import Product
from recycle_ds.inference.native.heads import NativeHead
from recycle_ds.inference.native.packing import PackedProduct
from recycle_ds.inference.native.screen import MOST_SCREENED_ROWS, ScreenedHead
from recycle_ds.model import RecycleGPT


class Head:
    """The rows of the output head for some token ids of this rank's shard."""

    def __init__(
        self, weight_VD: Tensor, ids: Tensor | None, barred: Tensor | None, *, int8: bool, compiled: bool, alone: bool
    ) -> None:
        """ids: token ids of the rows, int64, ascending: a head of drafts; None for 0, 1, ... barred: rows that are never
        chosen, int64, ascending; None for none. alone: whether this is the only rank with rows of it."""
        self.native: NativeHead | None = None
        """The same head without logits, where it is compiled."""
        self._screened: ScreenedHead | None = None
        self._product: PackedProduct | Product
        if compiled:
            self._product = PackedProduct(weight_VD, int8=int8, coarse=int8 and ids is not None)
            self.native = NativeHead(self._product, ids, barred)
            if alone and not int8:  # of a part, nobody asks for the likeliest tokens
                self._screened = ScreenedHead.of(weight_VD, self.native)
        else:
            self._product = Product(weight_VD, int8=int8)
        self._barred = barred

    def __call__(self, states_RD: Tensor) -> Tensor:
        """fp32 logits [R, V]."""
        logits_RV = self._product(states_RD).float()
        return logits_RV if self._barred is None else logits_RV.index_fill_(-1, self._barred, -torch.inf)

    def likeliest(self, states_RD: Tensor) -> list[int]:
        """The token id of each row with the highest logit, among equal ones the lowest; only of compiled heads."""
        assert self.native is not None
        if self._screened is not None and len(states_RD) <= MOST_SCREENED_ROWS:
            return self._screened.likeliest(states_RD)
        return self.native.likeliest(states_RD)


def head_of(model: RecycleGPT, compiled: bool, ids: Tensor | None = None) -> tuple[Tensor, Head]:
    """This shard's part of the vocabulary, or of the given ids: token ids, and their rows of the head.

    Ids without a token (of a padded vocabulary) are never chosen: not by the full model and not by the module, so that
    verification stays exact. Nor is the single row that stands for an empty shard.
    """
    weight, first = model.head_weight, model.shard.first
    own = torch.arange(first, first + model.shard.valid) if ids is None else ids.cpu()
    own = own[(own >= first) & (own < first + model.shard.valid)]
    barred = torch.isin(own, torch.tensor(model.unnamed_ids, dtype=torch.int64))
    if len(own) == 0:
        own, barred = torch.tensor([first]), torch.tensor([True])
    own = own.to(weight.device)
    rows = weight[: len(own)] if ids is None else weight[own - first]
    barred_ids = barred.nonzero()[:, 0].to(weight.device) if barred.any() else None
    int8 = model.int8 or (compiled and ids is not None)  # drafts are only guesses
    alone = model.shard.axis.size == 1
    return own, Head(rows, None if ids is None else own, barred_ids, int8=int8, compiled=compiled, alone=alone)
