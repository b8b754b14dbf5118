"""FlexAttention's blocks, compared with the dense mask that they represent, and the memory needed to build them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from recycle_ds.model.attention import compiled_flex
from recycle_ds.model.masks import BLOCK, AttentionMask, visible_blocks
from recycle_ds.training.benchmark.live_memory import PeakMemory


def packed(length: int, *boundaries: list[int]) -> Tensor:
    """Document indices [B, S]; a row's documents start at 0 and at its boundaries."""
    documents = torch.zeros(len(boundaries), length, dtype=torch.int64)
    for row, starts in zip(documents, boundaries, strict=True):
        for start in starts:
            row[start:] += 1
    return documents


def listed(count: Tensor | None, indices: Tensor | None) -> Tensor:
    """Bool [B, 1, rows, columns] of the blocks that a pair of FlexAttention's tensors lists."""
    assert count is not None and indices is not None
    columns = indices.shape[-1]
    positions = torch.where(torch.arange(columns) < count[..., None], indices, columns).long()
    return torch.zeros(*indices.shape[:3], columns + 1, dtype=torch.bool).scatter(3, positions, True)[..., :columns]


def materialised(mask: BlockMask) -> Tensor:
    """The mask that a kernel applies: full blocks, mask_mod in partial blocks, no others. Bool [B, 1, S, steps x S]."""
    queries, keys = mask.seq_lengths
    rows, columns = mask.BLOCK_SIZE
    partial, full = (
        listed(count, indices).repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, :, :queries, :keys]
        for count, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not (partial & full).any()
    batch = torch.arange(partial.shape[0])[:, None, None, None]
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    return full | partial & mask.mask_mod(batch, torch.tensor(0), query, key)


def reduced(dense: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Partially and fully visible blocks of a dense mask, found by checking each element."""
    rows, columns = (-(-side // size) for side in dense.shape[2:])
    filled = torch.zeros(dense.shape[0], rows * size, columns * size, dtype=torch.bool)
    filled[:, : dense.shape[2], : dense.shape[3]] = dense[:, 0]
    blocks = filled.view(-1, rows, size, columns, size)
    full = blocks.all(4).all(2)
    return blocks.any(4).any(2) & ~full, full


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 40), st.integers(1, 4), st.integers(2, 9))
def test_blocks_are_those_of_the_dense_mask(data: st.DataObject, length: int, steps: int, size: int) -> None:
    """Prevents a visible block that is missing or wrongly listed as full, and a hidden block that is listed."""
    starts = st.lists(st.integers(0, length), max_size=5)
    documents = packed(length, data.draw(starts), data.draw(starts))
    partial, full = visible_blocks(documents, steps, size)
    expected_partial, expected_full = reduced(AttentionMask(documents, steps).dense, size)
    assert torch.equal(partial, expected_partial)
    assert torch.equal(full, expected_full)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 20), st.integers(1, 3), st.integers(2, 5))
def test_recurring_document_indices_lose_no_block(data: st.DataObject, length: int, steps: int, size: int) -> None:
    """Prevents wrong attention if a document index recurs later in the row: the dense mask only compares indices."""
    row = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    documents = torch.tensor([data.draw(row), data.draw(row)])
    partial, full = visible_blocks(documents, steps, size)
    expected_partial, expected_full = reduced(AttentionMask(documents, steps).dense, size)
    assert torch.equal(full, expected_full)
    assert not (expected_partial & ~partial).any()
    assert not (partial & full).any()


LAYOUTS = [
    packed(32, [], [10]),
    packed(BLOCK, [], [1]),
    packed(3 * BLOCK, [], [BLOCK, 2 * BLOCK]),
    packed(3 * BLOCK + 1, [], [BLOCK + 5, 3 * BLOCK]),
    packed(5 * BLOCK - 1, [7, 300, 301], [2 * BLOCK]),
]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("documents", LAYOUTS, ids=lambda documents: str(documents.shape[1]))
def test_block_mask_equals_the_dense_mask(documents: Tensor, steps: int) -> None:
    """Prevents counts, an order or a transposition that differ from those of PyTorch's create_block_mask."""
    mask = AttentionMask(documents, steps)
    batch, length = documents.shape
    actual = mask.block_mask
    assert torch.equal(materialised(actual), mask.dense)
    reference = create_block_mask(actual.mask_mod, batch, None, length, steps * length, device="cpu")
    assert (actual.shape, actual.BLOCK_SIZE) == (reference.shape, reference.BLOCK_SIZE)
    for name in BlockMask._TENSOR_ATTRS:
        got, expected = getattr(actual, name), getattr(reference, name)
        assert (got is None) == (expected is None), name
        assert got is None or (got.dtype == expected.dtype and torch.equal(got, expected)), name


def test_most_blocks_of_a_long_document_are_full() -> None:
    """Prevents mask_mod from being evaluated in every block: only blocks on diagonals and at boundaries need it."""
    mask = AttentionMask(packed(16 * BLOCK, []), 3).block_mask
    assert mask.full_kv_num_blocks[0, 0].tolist() == list(range(16))
    assert mask.kv_num_blocks[0, 0].tolist() == [3] * 16


@pytest.mark.parametrize("steps", [1, 3])
def test_block_mask_costs_little_memory(steps: int) -> None:
    """Prevents an intermediate mask of S x steps S elements: 48 GiB at S = 131,072, a length meant for Ulysses."""
    peaks = {}
    for length in (16_384, 32_768, 131_072):
        # Meta tensors count bytes without allocation and cannot be read, so this also shows that nothing synchronises.
        documents = torch.zeros(1, length, dtype=torch.int64, device="meta" if length > 32_768 else "cpu")
        with PeakMemory() as tracker:
            shape = AttentionMask(documents, steps).block_mask.shape
        assert shape == (1, 1, length, steps * length)
        peaks[length] = tracker.peak
    print(f"peak of a mask of {steps} steps: " + ", ".join(f"{s:,}: {p / 2**20:.2f} MiB" for s, p in peaks.items()))
    for length, peak in peaks.items():
        assert peak < 40 * steps * (length // BLOCK) ** 2, length
    assert peaks[16_384] < 2 * 2**20


def test_the_first_step_uses_the_blocks_of_the_backbone() -> None:
    """Prevents the module's first step from building the mask a second time, in some hundred operations."""
    mask = AttentionMask(packed(2 * BLOCK, [], [10]))
    assert mask.at_step(1) is mask
    assert mask.at_step(2).steps == 2 and mask.at_step(2).at_step(2).at_step(1).steps == 1


def test_every_variant_of_flex_attention_is_compiled() -> None:
    """Prevents FlexAttention from running unfused, in silence, from the ninth variant on: torch's limit is 8."""
    counter = CompileCounter()
    compiled = compiled_flex(counter)
    variants = [(length, steps) for length in (8, 16, 24, 32, 40) for steps in (1, 2)]
    for length, steps in variants:
        mask = AttentionMask(packed(length, [], [5]), steps)
        query, keys = torch.randn(2, 2, length, 16), torch.randn(2, 2, steps * length, 16)
        compiled(query, keys, keys, block_mask=mask.block_mask)
    assert len(variants) > 8 and counter.frame_count == len(variants)
