"""Who may see whom: one description, a dense-mask back end (the reference, CPU) and FlexAttention (CUDA).

The recycle module's step k at position t sees the true entries 1..t of its document, made in step 1, and its own chain: the
entries of steps 2..k started at t. With the keys of all steps laid side by side, [step 1 | step 2 | ... | step k], that is a
causal block followed by k-1 diagonals, under one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Attention of packed sequences: causal within a document, plus `chain - 1` diagonal blocks.

    documents_BS numbers the documents of each row. chain = 1 is ordinary causal attention; keys then number S, else chain x S.
    """

    documents_BS: Tensor
    chain: int = 1

    @cached_property
    def plain_causal(self) -> bool:
        """Whether each row is a single document, so that the kernel's own causal mask serves. Synchronises the device."""
        return self.chain == 1 and bool((self.documents_BS == self.documents_BS[:, :1]).all())

    @cached_property
    def dense(self) -> Tensor:
        """Bool [B, 1, S, chain x S], True where attention is allowed."""
        documents = self.documents_BS
        length = documents.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
        block = causal & (documents[:, :, None] == documents[:, None, :])
        if self.chain > 1:
            diagonal = torch.eye(length, dtype=torch.bool, device=documents.device).expand_as(block)
            block = torch.cat([block] + [diagonal] * (self.chain - 1), dim=2)
        return block[:, None]

    def additive(self, dtype: torch.dtype) -> Tensor:
        """`dense` as 0 and -inf in a floating type, made once for all layers: SDPA would convert and keep one for each."""
        if dtype not in self._additive:
            zero = torch.zeros((), dtype=dtype, device=self.documents_BS.device)
            self._additive[dtype] = torch.where(self.dense, zero, float("-inf"))
        return self._additive[dtype]

    @cached_property
    def _additive(self) -> dict[torch.dtype, Tensor]:
        return {}

    @cached_property
    def block_mask(self) -> Any:
        """FlexAttention's BlockMask of the same description."""
        from torch.nn.attention.flex_attention import create_block_mask

        documents, length = self.documents_BS, self.documents_BS.shape[1]

        def allowed(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            position = key % length
            causal = (query >= position) & (documents[batch, query] == documents[batch, position])
            return torch.where(key < length, causal, query == position)

        batch = documents.shape[0]
        return create_block_mask(allowed, batch, None, length, self.chain * length, device=str(documents.device))

    def chained(self, chain: int) -> AttentionMask:
        """The mask of step `chain` of the recycle module over the same documents."""
        return AttentionMask(self.documents_BS, chain)


@dataclass(frozen=True)
class CachedMask:
    """Attention of `count` new tokens over a cache: each sees the past and the new tokens up to itself."""

    past: int
    count: int

    def dense(self, groups: int, device: torch.device) -> Tensor | None:
        """Bool [groups x count, past + count] for query heads laid out as query rows; None where all is visible."""
        if self.count == 1:
            return None
        keys = torch.arange(self.past + self.count, device=device)
        queries = torch.arange(self.past, self.past + self.count, device=device)
        return (keys[None, :] <= queries[:, None]).repeat(groups, 1)
