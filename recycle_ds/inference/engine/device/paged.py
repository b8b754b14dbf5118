"""Attention over a paged cache for rows that each see their own slots: tokens of a text, and nodes of a tree of drafts.

A row sees the positions lowest..root of its sequence, and of those after the root, as far as `end`, the ones whose bit is set:
bit k for position root + 1 + k. A token of a text at position p has root p and no bits; a node of a tree has its ancestors and
itself. A row with `end` 0 sees nothing and gets zeros: padding. Shapes: T rows, S sequences, W blocks, L positions, H query
heads, H_kv key/value heads, G of the former for each of the latter, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.inference.engine.cache import Tokens


@dataclass(frozen=True)
class Seen:
    """What each row sees. All are int64 [T] but the tables."""

    sequences_T: Tensor
    """Rows of the block tables."""
    roots_T: Tensor
    bits_T: Tensor
    ends_T: Tensor
    """The first position that is not seen, at most root + 65."""
    tables_SW: Tensor
    """Blocks of each sequence. Rows may lie further apart than W."""
    lowest: int
    block_size: int


class PagedAttention(Protocol):
    """Attention of queries [T, H, C] over keys and values [slots, 2 H_kv, C] of one layer. Returns [T, H * C].

    Memory that no row sees may hold anything, NaN included."""

    def __call__(self, stored: Tensor, query_THC: Tensor, seen: Seen, /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class PagedTokens(Tokens):
    """Rows of a step in static buffers."""

    positions_T: Tensor
    """For the rotary embedding."""
    seen: Seen
    attend: PagedAttention

    def rotary_positions(self) -> Tensor:
        """See `Tokens`."""
        return self.positions_T

    def attention(self) -> _Stored:
        """See `Tokens`."""
        return _Stored(self)


class _Stored:
    def __init__(self, tokens: PagedTokens) -> None:
        self._tokens = tokens

    def __call__(self, layer: int, query_THC: Tensor, keys_values_THC: Tensor) -> Tensor:
        """See `weights.Attend`."""
        tokens = self._tokens
        stored = tokens.keys_values[layer]
        stored.index_copy_(0, tokens.slots_T, keys_values_THC)
        return tokens.attend(stored, query_THC, tokens.seen)


def gathered(stored: Tensor, query_THC: Tensor, seen: Seen, /) -> Tensor:
    """`PagedAttention` in PyTorch's operations: the blocks of every row are copied, as far as the tables are wide."""
    rows, heads, channels = query_THC.shape
    kv_heads, size = stored.shape[1] // 2, seen.block_size
    at_L = torch.arange(seen.tables_SW.shape[1] * size, device=stored.device)
    slots_TL = seen.tables_SW.index_select(0, seen.sequences_T)[:, at_L // size] * size + at_L % size
    node_TL = at_L - seen.roots_T[:, None] - 1
    on_path_TL = (seen.bits_T[:, None] >> node_TL.clamp(0, 63)) & 1 == 1
    seen_TL = (at_L >= seen.lowest) & (at_L < seen.ends_T[:, None]) & ((node_TL < 0) | on_path_TL)
    # 0 where nothing may be read: 0 * NaN would be NaN; and for padding, which sees one zero
    entries = stored[slots_TL].masked_fill_(~seen_TL[:, :, None, None], 0.0).transpose(1, 2)
    visible_TL = seen_TL | ((seen.ends_T == 0)[:, None] & (at_L == 0))
    mixed = F.scaled_dot_product_attention(
        query_THC.view(rows, kv_heads, heads // kv_heads, channels),
        entries[:, :kv_heads],
        entries[:, kv_heads:],
        attn_mask=visible_TL[:, None, None],
    )
    return mixed.reshape(rows, heads * channels)


def paged_attention(device: torch.device) -> tuple[PagedAttention, str]:
    """The fastest attention for a device, and why it is not Triton's kernel on a GPU; empty if it is, and on CPUs."""
    if device.type != "cuda":
        return gathered, ""
    try:
        from recycle_ds.inference.engine.device.paged_kernel import paged
    except ImportError as error:
        return (
            gathered,
            f"attention copies the cache's blocks in every layer, which is slow: Triton is missing ({error})",
        )
    return paged, ""
