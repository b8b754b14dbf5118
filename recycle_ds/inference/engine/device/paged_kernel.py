"""`paged.PagedAttention` as Triton kernels. Importing this needs the package triton, which comes with PyTorch for GPUs.

A program serves one row and one key/value head: the G query heads of this head are the rows of its products. It reads the
sequence's keys and values where they are in the cache, with one pass for scores and sums (online softmax: Milakov and
Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). Where the text may be long, its positions are divided among
several programs, whose results a second kernel combines (as in Flash-Decoding), so that a single sequence keeps more than a
few of the GPU's processors busy. Only positions that a row sees are loaded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recycle_ds.inference.engine.device.paged import Seen

_KEYS = 64
"""Positions that a program reads at once."""
_PART = 256
"""Positions of a sequence for each program."""
_MOST_PARTS = 32
# Products of the tensor cores have at least 16 rows and columns.
_LEAST = 16


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, stored, mixed, largest, total, sequences, roots, bits, ends, tables,
    scale, lowest, table_stride, part_length,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    root, own_bits, end = tl.load(roots + row), tl.load(bits + row), tl.load(ends + row)
    table = tables + tl.load(sequences + row) * table_stride
    group, channel = tl.arange(0, GROUPS_PADDED), tl.arange(0, CHANNELS_PADDED)
    inside = channel < CHANNELS
    heads = row * KV_HEADS * GROUPS + head * GROUPS + group
    used = (group < GROUPS)[:, None] & inside[None, :]
    rows = tl.load(query + heads[:, None] * CHANNELS + channel[None, :], mask=used, other=0.0)
    if WIDEN:
        rows = rows.to(tl.float32)
    highest = tl.full([GROUPS_PADDED], float("-inf"), tl.float32)
    weight = tl.zeros([GROUPS_PADDED], tl.float32)
    sums = tl.zeros([GROUPS_PADDED, CHANNELS_PADDED], tl.float32)
    first = part.to(tl.int64) * part_length
    last = tl.minimum(first + part_length, end)
    for start in range(first, last, KEYS):
        at = start + tl.arange(0, KEYS).to(tl.int64)
        node = at - root - 1
        on_path = (own_bits >> tl.minimum(tl.maximum(node, 0), 63)) & 1
        seen = (at >= lowest) & (at < last) & ((node < 0) | (on_path == 1))
        block = tl.load(table + at // BLOCK, mask=seen, other=0)
        entry = ((block * BLOCK + at % BLOCK) * 2 * KV_HEADS + head) * CHANNELS
        read = seen[:, None] & inside[None, :]
        keys = tl.load(stored + entry[:, None] + channel[None, :], mask=read, other=0.0)
        if WIDEN:
            keys = keys.to(tl.float32)
        scores = tl.dot(rows, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - -inf would be NaN
        old = tl.exp(highest - base)
        chances = tl.exp(scores - base[:, None])
        values = tl.load(stored + (entry + KV_HEADS * CHANNELS)[:, None] + channel[None, :], mask=read, other=0.0)
        rounded = chances.to(values.dtype)
        if WIDEN:
            rounded, values = rounded.to(tl.float32), values.to(tl.float32)
        sums = sums * old[:, None] + tl.dot(rounded, values, input_precision=PRECISION)
        weight = weight * old + tl.sum(chances, 1)
        highest = higher
    if PARTS == 1:
        found = sums / tl.where(weight == 0.0, 1.0, weight)[:, None]
        tl.store(mixed + heads[:, None] * CHANNELS + channel[None, :], found.to(mixed.dtype.element_ty), mask=used)
    else:
        place = heads * PARTS + part
        tl.store(mixed + place[:, None] * CHANNELS + channel[None, :], sums, mask=used)
        tl.store(largest + place, highest, mask=group < GROUPS)
        tl.store(total + place, weight, mask=group < GROUPS)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    sums, largest, total, mixed,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    part, channel = tl.arange(0, PARTS_PADDED), tl.arange(0, CHANNELS_PADDED)
    there, inside = part < PARTS, channel < CHANNELS
    place = head * PARTS + part
    highest = tl.load(largest + place, mask=there, other=float("-inf"))
    weight = tl.load(total + place, mask=there, other=0.0)
    base = tl.max(highest, 0)
    share = tl.exp(highest - tl.where(base == float("-inf"), 0.0, base))
    own = tl.load(sums + place[:, None] * CHANNELS + channel[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    norm = tl.sum(weight * share, 0)
    found = tl.sum(own * share[:, None], 0) / tl.where(norm == 0.0, 1.0, norm)
    tl.store(mixed + head * CHANNELS + channel, found.to(mixed.dtype.element_ty), mask=inside)


def paged(stored: Tensor, query_THC: Tensor, seen: Seen, /) -> Tensor:
    """See `paged.PagedAttention`."""
    rows, heads, channels = query_THC.shape
    kv_heads = stored.shape[1] // 2
    query_THC = query_THC.contiguous()
    positions = seen.tables_SW.shape[1] * seen.block_size
    parts = min(max(-(-positions // _PART), 1), _MOST_PARTS)
    length = -(-positions // parts // _KEYS) * _KEYS if parts > 1 else positions
    length = max(length, -(-positions // parts))
    groups, padded = heads // kv_heads, max(triton.next_power_of_2(channels), _LEAST)
    mixed = torch.empty_like(query_THC)
    sums, largest, total = mixed, mixed, mixed  # not used by a single part
    if parts > 1:
        sums = torch.empty((rows, heads, parts, channels), dtype=torch.float32, device=mixed.device)
        largest, total = torch.empty((2, rows, heads, parts), dtype=torch.float32, device=mixed.device)
    with torch.cuda.device_of(stored):  # Triton takes the thread's own device, whatever its arguments are on
        _attend[(rows, kv_heads, parts)](
            query_THC, stored, sums, largest, total,
            seen.sequences_T, seen.roots_T, seen.bits_T, seen.ends_T, seen.tables_SW,
            channels**-0.5, seen.lowest, seen.tables_SW.stride(0), length,
            KV_HEADS=kv_heads, GROUPS=groups, GROUPS_PADDED=max(triton.next_power_of_2(groups), _LEAST),
            CHANNELS=channels, CHANNELS_PADDED=padded, BLOCK=seen.block_size, KEYS=_KEYS, PARTS=parts,
            PRECISION="ieee" if query_THC.dtype == torch.float32 else "tf32",
            WIDEN=mixed.device.type == "cpu",  # the interpreter multiplies the bits of bf16 numbers as if they were integers
        )  # fmt: skip
        if parts > 1:
            _combine[(rows * heads,)](
                sums, largest, total, mixed,
                CHANNELS=channels, CHANNELS_PADDED=padded, PARTS=parts, PARTS_PADDED=triton.next_power_of_2(parts),
            )  # fmt: skip
    return mixed.view(rows, heads * channels)
