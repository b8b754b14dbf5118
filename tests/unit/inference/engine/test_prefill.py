"""Chunks of prompts on a GPU take the flash kernel: the same attention without a mask in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from recycle_ds.inference.engine import cache
from recycle_ds.inference.engine.cache import Attention, takes_flash
from recycle_ds.inference.native.spans import Span

SIZE, BLOCKS = 16, 8


def _attend(span: Span) -> Tensor:
    torch.manual_seed(1)
    stored = torch.randn(1, BLOCKS * SIZE, 4, 32).bfloat16()
    query, own = torch.randn(span.count, 6, 32).bfloat16(), torch.randn(span.count, 4, 32).bfloat16()
    slots = [span.blocks[at // SIZE] * SIZE + at % SIZE for at in range(span.first, span.end)]
    return Attention(stored, [span], torch.tensor(slots), SIZE)(0, query, own)


@pytest.mark.parametrize("blocks", [(2, 3, 4, 5), (5, 0, 3, 1)], ids=["adjacent", "scattered"])
@pytest.mark.parametrize(("first", "count", "lowest"), [(0, 40, 0), (20, 30, 0), (1, 40, 1), (17, 25, 1)])
def test_a_chunk_attends_without_a_dense_mask(
    blocks: tuple[int, ...], first: int, count: int, lowest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents prefill from the slower kernel with a mask of all scores, and one whose queries see other keys than before."""
    span = Span(blocks, first, count, lowest)
    expected = _attend(span)
    masks: list[object] = []
    attention = F.scaled_dot_product_attention

    def watched(*arguments: Any, **named: Any) -> Tensor:
        masks.append(named.get("attn_mask"))
        return attention(*arguments, **named)

    # not in torch itself, which tells by the function what to do with the mask
    monkeypatch.setattr(cache, "F", SimpleNamespace(scaled_dot_product_attention=watched))
    monkeypatch.setattr(cache, "takes_flash", lambda spans, like: True)
    found = _attend(span)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    # a mask of its own type, which is materialised only where there is no flash kernel; none where all keys are the chunk's
    assert isinstance(masks[0], CausalBias)


def test_who_takes_the_flash_kernel() -> None:
    """Prevents fp32, trees and batches of short parts from a kernel that cannot compute them, and a CPU from a slower one."""

    class OnGpu:
        is_cuda = True

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    chunk, tree = Span((0, 1, 2), 0, 40), Span((0, 1, 2), 0, 20, 0, 17, (0, 1))
    assert takes_flash([chunk], OnGpu(torch.bfloat16))  # type: ignore[arg-type]
    assert not takes_flash([chunk], OnGpu(torch.float32))  # type: ignore[arg-type]
    assert not takes_flash([tree], OnGpu(torch.bfloat16))  # type: ignore[arg-type]
    assert not takes_flash([chunk, chunk], OnGpu(torch.bfloat16))  # type: ignore[arg-type]
    assert not takes_flash([Span((0,), 3, 1)], OnGpu(torch.bfloat16))  # type: ignore[arg-type]
    assert not takes_flash([chunk], torch.zeros(1, dtype=torch.bfloat16))
