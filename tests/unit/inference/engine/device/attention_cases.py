"""Random cases for attention over a paged cache, and the dense reference."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.inference.engine.device.paged import PagedAttention, Seen

# Query heads, key/value heads, channels, positions at most, lowest position: several parts of a sequence with 520.
SHAPES = ((4, 2, 16, 70, 0), (9, 3, 64, 90, 1), (3, 3, 20, 40, 0), (6, 1, 32, 520, 1))
_BLOCK = 16


@dataclass(frozen=True)
class Case:
    """One call, and which positions each row sees."""

    stored: Tensor
    query: Tensor
    seen: Seen
    visible: list[list[int]]


def random_case(shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int, device: str = "cpu") -> Case:
    """Sequences of random lengths in random blocks: texts, trees and padding. Memory that nothing sees is NaN."""
    heads, kv_heads, channels, most, lowest = shape
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    width, sequences = -(-most // _BLOCK), 3
    blocks = list(range(sequences * width + 1))
    draw.shuffle(blocks)
    tables = [blocks[number * width : (number + 1) * width] for number in range(sequences)]
    rows: list[tuple[int, int, int, int]] = []
    visible: list[list[int]] = []
    for number in range(sequences):
        length = draw.randint(lowest + 1, most - 12) if number else most - 12
        for at in sorted({lowest, length // 2, length - 1} | {draw.randrange(lowest, length)}):
            rows.append((number, at, 0, at + 1))
            visible.append(list(range(lowest, at + 1)))
        root, paths = length - 1, [()]
        for node in range(1, 12):
            paths.append((*paths[draw.randrange(node)], node))
            rows.append((number, root, sum(1 << one - 1 for one in paths[node]), root + node + 1))
            visible.append([*range(lowest, root + 1), *(root + one for one in paths[node])])
    rows.insert(2, (0, 0, 0, 0))
    visible.insert(2, [])
    stored = torch.full((len(blocks) * _BLOCK, 2 * kv_heads, channels), float("nan"), dtype=dtype)
    for (number, *_), positions in zip(rows, visible, strict=True):
        slots = [tables[number][at // _BLOCK] * _BLOCK + at % _BLOCK for at in positions]
        stored[slots] = torch.randn(len(slots), 2 * kv_heads, channels, generator=generator).to(dtype)
    query = torch.randn(len(rows), heads, channels, generator=generator).to(dtype)
    columns = (torch.tensor(one).to(device) for one in zip(*rows, strict=True))
    wide = torch.cat((torch.tensor(tables), torch.full((sequences, 3), 10**6)), dim=1).to(device)
    seen = Seen(*columns, wide[:, :width], lowest, _BLOCK)
    return Case(stored.to(device), query.to(device), seen, visible)


def dense(case: Case) -> Tensor:
    """Every row on its own, in fp32: SDPA over the positions that it sees; zeros without any."""
    kv_heads, found = case.stored.shape[1] // 2, []
    tables = case.seen.tables_SW.tolist()
    for row, positions in enumerate(case.visible):
        blocks = tables[int(case.seen.sequences_T[row])]
        slots = [blocks[at // _BLOCK] * _BLOCK + at % _BLOCK for at in positions]
        entries = case.stored[slots].float().transpose(0, 1)
        if not slots:
            found.append(torch.zeros(case.query[row].numel(), device=case.query.device))
            continue
        query = case.query[row].float()[:, None]
        mixed = F.scaled_dot_product_attention(query, entries[:kv_heads], entries[kv_heads:], enable_gqa=True)
        found.append(mixed.flatten())
    return torch.stack(found)


def check(attend: PagedAttention, device: str = "cpu") -> None:
    """Asserts that attention is that of the dense reference, over all shapes, in fp32 and bf16."""
    for number, shape in enumerate(SHAPES):
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
            case = random_case(shape, dtype, number, device)
            found = attend(case.stored, case.query, case.seen)
            assert found.dtype == dtype
            worst = (found.float() - dense(case)).abs().max().item()
            assert worst < tolerance, f"{shape} {dtype}: {worst}"
