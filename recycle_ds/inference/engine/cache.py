"""The tensors of the KV cache, allocated once, and attention over them.

A slot is a position in the cache: block * block size + offset. Besides keys and values it holds the token and, for the
recycle module, the backbone's state. Keys and values of a sequence are read in place where its blocks are adjacent, and
gathered (one copy into a padded batch) elsewhere. The compiled kernels keep the keys and values of a block of 16 slots in an
order of their own, see native/c/attention.h. Shapes: T tokens of a step, N sequences, W tokens per sequence, L
cached positions, G query heads per key/value head, H_kv key/value heads, C channels of a head, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from recycle_ds.inference.native.arena import empty_in_huge_pages
from recycle_ds.inference.native.spans import Span

if TYPE_CHECKING:
    from recycle_ds.inference.engine.weights import StageWeights

# A part with more tokens (a chunk of a prompt) attends on its own.
_FEW_TOKENS = 16
# Sequences attend together while padding at most doubles the positions that are read.
_MOST_PADDING = 2.0


class Cache:
    """The cache of one rank. slots: number of blocks times positions per block."""

    def __init__(self, weights: StageWeights, blocks: int, block_size: int) -> None:
        shape = (blocks * block_size, 2 * weights.kv_heads, weights.channels)

        # uninitialised on purpose: a slot is written before it is read, and memory is only used once it is written
        def empty(*sizes: int, dtype: torch.dtype = weights.dtype) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=weights.device)

        self.block_size = block_size
        self._compiled = weights.why_not_compiled is None
        entries = partial(empty_in_huge_pages, dtype=weights.dtype) if self._compiled else empty
        self.keys_values = entries(weights.layers, *shape)
        self.module_keys_values = entries(weights.module_layers, *shape)
        self.tokens = empty(shape[0], dtype=torch.int64)
        self.hidden = empty(shape[0] if weights.module is not None else 0, weights.kept_width)
        on_host = weights.device.type == "cpu"
        # a few elements are read and written through NumPy in a tenth of the time of indexed tensors
        self._tokens_on_host = self.tokens.numpy() if on_host else None
        self._hidden_on_host = self.hidden.view(torch.uint8).numpy() if on_host else None
        compiled = self._compiled and weights.layers > 0
        self._entries_on_host = _entries(self.keys_values, block_size) if compiled else None
        self.contents = weights.contents(self.tokens, self.hidden)
        """Tokens and states for `StageWeights.run_in_cache`; None where that is not possible."""

    def write_tokens(self, spans: Sequence[Span], ids: Sequence[int]) -> None:
        """Writes the tokens of all query positions of the spans, one after the other."""
        if self._tokens_on_host is None:
            self.tokens[self.slots(spans)] = torch.tensor(ids, device=self.tokens.device)
            return
        for slot, token in zip(self._slots(spans), ids, strict=True):
            self._tokens_on_host[slot] = token

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks, (from, to)."""
        for source, target in pairs:
            read, write = (slice(block * self.block_size, (block + 1) * self.block_size) for block in (source, target))
            for tensor in (self.keys_values, self.module_keys_values):
                tensor[:, write] = tensor[:, read]
            for tensor in (self.tokens, self.hidden):
                tensor[write] = tensor[read]

    def move(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Moves keys and values of the backbone, slots (from, to), as if all were read before any is written."""
        if not pairs or not len(self.keys_values):
            return
        if self._entries_on_host is None:
            read, write = (torch.tensor(slots, device=self.tokens.device) for slots in zip(*pairs, strict=True))
            self.keys_values[:, write] = self.keys_values[:, read]
            return
        keys, values = self._entries_on_host
        size = self.block_size
        moved = []
        for source, _ in pairs:
            block, at = divmod(source, size)
            moved.append((keys[:, block, :, :, at].copy(), values[:, block, :, at // 2, :, at % 2].copy()))
        for (_, target), (key, value) in zip(pairs, moved, strict=True):
            block, at = divmod(target, size)
            keys[:, block, :, :, at], values[:, block, :, at // 2, :, at % 2] = key, value

    def move_states(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Moves tokens, and states for the recycle module, likewise."""
        if not pairs:
            return
        if self._tokens_on_host is None or self._hidden_on_host is None:
            read, write = (torch.tensor(slots, device=self.tokens.device) for slots in zip(*pairs, strict=True))
            for tensor in (self.tokens, self.hidden):
                if len(tensor):
                    tensor[write] = tensor[read]
            return
        sources, targets = (list(slots) for slots in zip(*pairs, strict=True))
        for array in (self._tokens_on_host, self._hidden_on_host):
            if len(array):
                array[targets] = array[sources]

    def slots(self, spans: Sequence[Span]) -> Tensor:
        """Slots of all query positions of the spans, one after the other [T]."""
        return torch.tensor(self._slots(spans), device=self.tokens.device)

    def _slots(self, spans: Sequence[Span]) -> list[int]:
        size = self.block_size
        return [span.blocks[at // size] * size + at % size for span in spans for at in range(span.first, span.end)]

    @staticmethod
    def bytes_per_block(weights: StageWeights, block_size: int) -> int:
        """Memory of one block on this rank, in bytes."""
        layers = weights.layers + weights.module_layers
        per_slot = 2 * weights.kv_heads * weights.channels * layers + weights.kept_width
        return block_size * (per_slot * weights.dtype.itemsize + 8)


def _entries(keys_values: Tensor, size: int) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Keys [layers, blocks, heads, channel pairs, positions] and values [layers, blocks, heads, position pairs, channels, 2] as
    the compiled kernels keep them, by their bits. size: positions of a block."""
    layers, _, entries, channels = keys_values.shape
    heads = entries // 2
    halves = keys_values.view(torch.uint16).numpy().reshape(layers, -1, 2, heads * size * channels)
    keys = halves[:, :, 0].view(np.uint32).reshape(layers, -1, heads, channels // 2, size)
    values = halves[:, :, 1].reshape(layers, -1, heads, size // 2, channels, 2)
    assert np.shares_memory(keys, halves) and np.shares_memory(values, halves), "entries are moved in the cache itself"
    return keys, values


@dataclass(frozen=True)
class Tokens:
    """The tokens of one pass, and the cache [layers, slots, 2 H_kv, C] that they are stored in."""

    keys_values: Tensor
    spans: Sequence[Span]
    slots_T: Tensor
    block_size: int
    shift: int = 0
    """Added to a token's position for its rotary position."""

    def rotary_positions(self) -> Tensor:
        """Position of every token for the rotary embedding [T]."""
        positions = [span.position(at) + self.shift for span in self.spans for at in range(span.first, span.end)]
        return torch.tensor(positions, device=self.keys_values.device)

    def attention(self) -> Callable[[int, Tensor, Tensor], Tensor]:
        """Attention in PyTorch's operations."""
        return Attention(self.keys_values, self.spans, self.slots_T, self.block_size)


class Attention:
    """Attention of one step's spans over the keys and values of a stack of layers [layers, slots, 2 H_kv, C]."""

    def __init__(self, keys_values: Tensor, spans: Sequence[Span], slots_T: Tensor, block_size: int) -> None:
        self._keys_values, self._slots_T = keys_values, slots_T
        firsts, at = [], 0
        for span in spans:
            firsts.append(at)
            at += span.count
        self._groups = [
            _Group([spans[i] for i in members], [firsts[i] for i in members], at, block_size, keys_values)
            for members in _grouped(spans)
        ]

    def __call__(self, layer: int, query_THC: Tensor, keys_values_THC: Tensor) -> Tensor:
        """See `weights.Attend`."""
        stored = self._keys_values[layer]
        stored.index_copy_(0, self._slots_T, keys_values_THC)
        if len(self._groups) == 1:
            return self._groups[0](stored, query_THC)
        mixed = torch.empty_like(query_THC).flatten(1)
        for group in self._groups:
            mixed[group.rows_M] = group(stored, query_THC)
        return mixed


class _Group:
    """Spans that attend in one call. Shorter ones are padded: with their last query, and with masked keys."""

    def __init__(self, spans: Sequence[Span], firsts: Sequence[int], total: int, size: int, like: Tensor) -> None:
        """firsts: row of each span's first token among the `total` tokens of the step. size: positions per block."""
        device = like.device
        self._kv_heads, self._number = like.shape[2] // 2, len(spans)
        self._width = max(span.count for span in spans)
        self._length = max(span.end - span.lowest for span in spans)
        rows = [
            list(range(first, first + span.count)) + [first + span.count - 1] * (self._width - span.count)
            for span, first in zip(spans, firsts, strict=True)
        ]
        flat = [row for span_rows in rows for row in span_rows]
        padded = any(span.count < self._width for span in spans)
        self._queries = None if flat == list(range(total)) else torch.tensor(flat, device=device)
        kept = [i * self._width + j for i, span in enumerate(spans) for j in range(span.count)]
        self._kept = torch.tensor(kept, device=device) if padded else None
        self.rows_M = torch.tensor(
            [row for rows_, s in zip(rows, spans, strict=True) for row in rows_[: s.count]], device=device
        )
        self._start = _adjacent(spans[0], size) if len(spans) == 1 else None
        self._slots = None if self._start is not None else self._padded_slots(spans, size, device)
        self._causal = causal_lower_right(self._width, self._length) if takes_flash(spans, like) else None
        self._mask = self._dense_mask(spans, like) if self._causal is None else None

    def _padded_slots(self, spans: Sequence[Span], size: int, device: torch.device) -> Tensor:
        """Slots of the keys of all spans [N * L]. Padding reads a span's last slot again, and is masked."""
        most = max(len(span.blocks) for span in spans)
        tables = torch.tensor([[*span.blocks, *[0] * (most - len(span.blocks))] for span in spans], device=device)
        lowest_N1 = torch.tensor([span.lowest for span in spans], device=device)[:, None]
        last_N1 = torch.tensor([span.end - 1 for span in spans], device=device)[:, None]
        at_NL = torch.minimum(lowest_N1 + torch.arange(self._length, device=device), last_N1)
        return (tables.gather(1, at_NL // size) * size + at_NL % size).flatten()

    def _dense_mask(self, spans: Sequence[Span], like: Tensor) -> Tensor | None:
        """0 and -inf [N, 1, W, L]; None where every query sees all keys."""
        trees = any(span.parents for span in spans)
        if not trees and all(span.count == 1 and span.end - span.lowest == self._length for span in spans):
            return None
        device = like.device
        last = [[min(s.first + j, s.end - 1) - s.lowest for j in range(self._width)] for s in spans]
        last_NW = torch.tensor(last, device=device)
        hidden_NWL = torch.arange(self._length, device=device) > last_NW[:, :, None]
        for row, span in enumerate(spans) if trees else ():
            for j in range(self._width):
                slot = min(span.first + j, span.end - 1)
                if path := span.path(slot):
                    own = hidden_NWL[row, j]
                    own[span.root + 1 - span.lowest :] = True
                    own[[at - span.lowest for at in path]] = False
        mask = torch.zeros(hidden_NWL.shape, dtype=like.dtype, device=device).masked_fill_(hidden_NWL, float("-inf"))
        return mask[:, None]

    def __call__(self, stored: Tensor, query_THC: Tensor) -> Tensor:
        """Returns [M, H * C] for the group's M queries, in the order of `rows_M`."""
        number, width, length, kv_heads = self._number, self._width, self._length, self._kv_heads
        heads, channels = query_THC.shape[1:]
        query = query_THC if self._queries is None else query_THC.index_select(0, self._queries)
        if self._start is not None:
            entries = stored[self._start : self._start + length]
        else:
            assert self._slots is not None
            entries = stored.index_select(0, self._slots)
        entries = entries.view(number, length, 2 * kv_heads, channels).transpose(1, 2)
        if self._causal is not None:
            keys, values, queries = entries[:, :kv_heads], entries[:, kv_heads:], query.transpose(0, 1)[None]
            mixed = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=self._causal, enable_gqa=heads != kv_heads
            )
            return mixed[0].transpose(0, 1).reshape(width, heads * channels)
        # the query heads of one key/value head become rows: one pass over the cache serves them all
        groups = heads // kv_heads
        rows = query.view(number, width, kv_heads, groups, channels).permute(0, 2, 3, 1, 4)
        rows = rows.reshape(number, kv_heads, groups * width, channels)
        if self._mask is not None and self._mask.shape[2] != groups * width:  # for the first layer; the same for all
            self._mask = self._mask.repeat(1, 1, groups, 1)
        mixed = F.scaled_dot_product_attention(rows, entries[:, :kv_heads], entries[:, kv_heads:], attn_mask=self._mask)
        mixed = mixed.reshape(number, kv_heads, groups, width, channels).permute(0, 3, 1, 2, 4)
        mixed = mixed.reshape(number * width, heads * channels)
        return mixed if self._kept is None else mixed.index_select(0, self._kept)


def takes_flash(spans: Sequence[Span], like: Tensor) -> bool:
    """Whether the flash kernel attends: for a chunk of a prompt on a GPU. It takes no dense mask, no fp32 and no trees."""
    half = like.dtype in (torch.bfloat16, torch.float16)
    return like.is_cuda and half and len(spans) == 1 and spans[0].count > _FEW_TOKENS and not spans[0].parents


def _grouped(spans: Sequence[Span]) -> list[list[int]]:
    """Indices of the spans that attend together: short ones with similar lengths; every long one alone."""
    short = sorted(
        (i for i, span in enumerate(spans) if span.count <= _FEW_TOKENS), key=lambda i: spans[i].end - spans[i].lowest
    )
    groups: list[list[int]] = []
    longest = 0
    for i in reversed(short):
        length = spans[i].end - spans[i].lowest
        if not groups or length * _MOST_PADDING < longest:
            groups.append([])
            longest = length
        groups[-1].append(i)
    groups = [sorted(group) for group in groups]
    return groups + [[i] for i, span in enumerate(spans) if span.count > _FEW_TOKENS]


def _adjacent(span: Span, size: int) -> int | None:
    """The first slot that a span reads if all its slots are adjacent, else None."""
    needed = span.blocks[span.lowest // size : (span.end - 1) // size + 1]
    if any(block != needed[0] + i for i, block in enumerate(needed)):
        return None
    return needed[0] * size + span.lowest % size
