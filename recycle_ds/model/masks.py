"""Attention masks: one description, as a dense mask (the reference, CPU) or as FlexAttention blocks (CUDA).

At position t, unrolled step k of the recycle module attends to the step-1 entries 1..t of its document and to the
entries of its own steps 2..k, which started at t. With the keys of all steps concatenated, [step 1 | step 2 | ... |
step k], this is a causal block followed by k-1 diagonal blocks, under one softmax."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries and keys per FlexAttention block: its default, a multiple of its kernels' tile sizes


@dataclass(frozen=True)
class AttentionMask:
    """Attention of packed sequences: causal within a document, plus `steps - 1` diagonal blocks.

    documents_BS has the document index of each token. steps = 1 is ordinary causal attention; there are steps x S keys.
    single: whether each row is one document, where the host knows it (see `Batch.single`); None if it does not.
    """

    documents_BS: Tensor
    steps: int = 1
    single: bool | None = None

    @cached_property
    def plain_causal(self) -> bool:
        """Whether the kernel's built-in causal mask is enough, because each row is one document.

        Does not synchronise a device: documents that are on one and of which the host knows nothing count as packed.
        """
        if self.steps > 1 or self.single is not None:
            return self.steps == 1 and bool(self.single)
        return self.documents_BS.device.type == "cpu" and rows_are_single(self.documents_BS)

    def prepare(self, dtype: torch.dtype) -> AttentionMask:
        """Builds what the attention of this device needs, once for all layers and outside compiled code. Returns itself.

        dtype: of the queries."""
        if not self.plain_causal:
            if self.documents_BS.is_cuda:
                _ = self.block_mask
            else:
                self.additive(dtype)
        return self

    @cached_property
    def dense(self) -> Tensor:
        """Bool [B, 1, S, steps x S], True where attention is allowed."""
        documents = self.documents_BS
        length = documents.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
        block = causal & (documents[:, :, None] == documents[:, None, :])
        if self.steps > 1:
            diagonal = torch.eye(length, dtype=torch.bool, device=documents.device).expand_as(block)
            block = torch.cat([block] + [diagonal] * (self.steps - 1), dim=2)
        return block[:, None]

    def additive(self, dtype: torch.dtype) -> Tensor:
        """`dense` as 0 and -inf in a float dtype, built once for all layers: SDPA would convert and keep one per layer."""
        if dtype not in self._additive:
            zero = torch.zeros((), dtype=dtype, device=self.documents_BS.device)
            self._additive[dtype] = torch.where(self.dense, zero, float("-inf"))
        return self._additive[dtype]

    @cached_property
    def _additive(self) -> dict[torch.dtype, Tensor]:
        return {}

    @cached_property
    def block_mask(self) -> Any:
        """The same mask as FlexAttention's BlockMask. Does not synchronise the device."""
        from torch.nn.attention.flex_attention import BlockMask

        documents, length = self.documents_BS, self.documents_BS.shape[1]

        def allowed(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            position = key % length
            causal = (query >= position) & (documents[batch, query] == documents[batch, position])
            return torch.where(key < length, causal, query == position)

        # create_block_mask evaluates `allowed` on S x (steps x S): tens of GiB at lengths that attention itself can process.
        partial, full = visible_blocks(documents, self.steps, BLOCK)
        return BlockMask.from_kv_blocks(
            *_in_order(partial[:, None]),
            *_in_order(full[:, None]),
            BLOCK_SIZE=BLOCK,
            mask_mod=allowed,
            seq_lengths=(length, self.steps * length),
        )

    def at_step(self, step: int) -> AttentionMask:
        """The mask of unrolled step `step` of the recycle module over the same documents; this one, with the blocks that it
        has already computed, if it is that step's."""
        return self if step == self.steps else AttentionMask(self.documents_BS, step, self.single)


def rows_are_single(documents_BS: Tensor) -> bool:
    """Whether each row is one document. Synchronises a device."""
    return bool((documents_BS == documents_BS[:, :1]).all())


def visible_blocks(documents_BS: Tensor, steps: int, size: int) -> tuple[Tensor, Tensor]:
    """Which `size` x `size` blocks of an AttentionMask are partially visible, and which are fully visible.

    Bool [B, ceil(S / size), ceil(steps x S / size)] each. The partially visible blocks are exact if a row's document
    indices never decrease, as in packed data. Otherwise they may include hidden blocks, which costs time but not
    correctness."""
    length, device = documents_BS.shape[1], documents_BS.device
    rows, columns = -(-length // size), -(-steps * length // size)
    # An incomplete last block is padded with its last document, which does not change its range.
    filled = documents_BS[:, torch.arange(rows * size, device=device).clamp(max=length - 1)]
    low, high = filled.unflatten(1, (rows, size)).aminmax(dim=2)
    shared = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    single = low == high
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    # An incomplete block is never full, as in create_block_mask.
    full = (shared & single[:, :, None] & single[:, None, :] & (row < length // size)).tril(-1)
    full, visible = (F.pad(blocks, (0, columns - rows)) for blocks in (full, shared.tril()))
    first, last = row * size, ((row + 1) * size).clamp(max=length) - 1
    for shift in range(length, steps * length, length):
        # If size does not divide S, the diagonals of later steps cross block boundaries.
        visible |= ((shift + first) // size <= column) & (column <= (shift + last) // size)
    return visible & ~full, full


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A bool matrix in FlexAttention's format: the number of True columns per row, and the column indices, True ones
    first."""
    listed = blocks.int()
    return listed.sum(-1, dtype=torch.int32), listed.argsort(dim=-1, descending=True, stable=True).int()
