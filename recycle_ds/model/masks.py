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
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries and keys of a FlexAttention block: its default, a multiple of its kernels' tiles


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
        """FlexAttention's BlockMask of the same description. Does not synchronise the device."""
        from torch.nn.attention.flex_attention import BlockMask

        documents, length = self.documents_BS, self.documents_BS.shape[1]

        def allowed(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            position = key % length
            causal = (query >= position) & (documents[batch, query] == documents[batch, position])
            return torch.where(key < length, causal, query == position)

        # create_block_mask evaluates `allowed` on S x chain S: tens of GiB at lengths that attention itself manages.
        partial, full = visible_blocks(documents, self.chain, BLOCK)
        return BlockMask.from_kv_blocks(
            *_in_order(partial[:, None]),
            *_in_order(full[:, None]),
            BLOCK_SIZE=BLOCK,
            mask_mod=allowed,
            seq_lengths=(length, self.chain * length),
        )

    def chained(self, chain: int) -> AttentionMask:
        """The mask of step `chain` of the recycle module over the same documents."""
        return AttentionMask(self.documents_BS, chain)


def visible_blocks(documents_BS: Tensor, chain: int, size: int) -> tuple[Tensor, Tensor]:
    """The blocks of `size` x `size` of an AttentionMask that are visible in part and in full.

    Bool [B, ceil(S / size), ceil(chain x S / size)] each. The first lists no block in vain where a row's numbers never
    decrease, as in packed data; else it may, which costs time and not correctness.
    """
    length, device = documents_BS.shape[1], documents_BS.device
    rows, columns = -(-length // size), -(-chain * length // size)
    # A ragged last block is filled up with its last document, which leaves its range as it is.
    filled = documents_BS[:, torch.arange(rows * size, device=device).clamp(max=length - 1)]
    low, high = filled.unflatten(1, (rows, size)).aminmax(dim=2)
    shared = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    single = low == high
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    # A ragged block is never full, as in create_block_mask.
    full = (shared & single[:, :, None] & single[:, None, :] & (row < length // size)).tril(-1)
    full, visible = (F.pad(blocks, (0, columns - rows)) for blocks in (full, shared.tril()))
    first, last = row * size, ((row + 1) * size).clamp(max=length) - 1
    for shift in range(length, chain * length, length):
        # Where size does not divide S, the diagonals of later steps run across blocks.
        visible |= ((shift + first) // size <= column) & (column <= (shift + last) // size)
    return visible & ~full, full


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a bool matrix: how many columns each row lists, and the columns, those listed first."""
    listed = blocks.int()
    return listed.sum(-1, dtype=torch.int32), listed.argsort(dim=-1, descending=True, stable=True).int()


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
