"""FlexAttention, which training uses on GPUs, against dense attention, its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ds.model.attention import dense, flex
from recycle_ds.model.masks import AttentionMask
from tests.gpu.device import device, rehearsal

_LENGTHS = (128,) if rehearsal() else (256, 300)
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


def _documents(length: int) -> Tensor:
    """Two rows: several documents, of which one ends inside a block, and a single one."""
    packed = torch.zeros(length, dtype=torch.int64)
    for start in (length // 7, length // 2, length - 3):
        packed[start:] += 1
    return torch.stack((packed, torch.zeros_like(packed))).to(device())


def _inputs(length: int, steps: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + steps)
    shapes = [(2, 6, length, 64), (2, 2, steps * length, 64), (2, 2, steps * length, 64)]
    return [torch.randn(shape, generator=generator).to(device(), dtype) for shape in shapes]


def _check(dtype: torch.dtype) -> None:
    for length in _LENGTHS:
        for steps in (1, 3):
            mask = AttentionMask(_documents(length), steps)
            own, other = (
                [one.clone().requires_grad_(not rehearsal()) for one in _inputs(length, steps, dtype)] for _ in "ab"
            )
            found, expected = flex(*own, mask, compiled=not rehearsal()), dense(*other, mask)
            what = f"{dtype}, length {length}, {steps} steps"
            _near(found, expected, dtype, what)
            if not rehearsal():  # FlexAttention has no backward pass on CPUs
                weight = torch.linspace(-1, 1, found.numel(), device=found.device, dtype=dtype).view(found.shape)
                (found * weight).sum().backward()
                (expected * weight).sum().backward()
                for one, another in zip(own, other, strict=True):
                    assert one.grad is not None and another.grad is not None
                    _near(one.grad, another.grad, dtype, f"{what}: gradient")


def _near(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    scale = expected.float().abs().max().clamp_min(1.0)
    error = float(((found.float() - expected.float()).abs().max() / scale).detach())
    assert error < _TOLERANCE[dtype], f"{what}: off by {error:.2e}"


def test_flex_equals_dense_in_fp32() -> None:
    """Prevents blocks that are hidden or shown wrongly, forward or backward, for packed documents and unrolled chains."""
    _check(torch.float32)


def test_flex_equals_dense_in_bf16() -> None:
    """Prevents the same in the arithmetic of real runs."""
    _check(torch.bfloat16)


def test_single_documents_take_a_fused_kernel() -> None:
    """Prevents the built-in causal mask from computing something else than a dense one, and all scores in memory: no fused
    kernel takes grouped heads in fp32, and PyTorch goes back to separate operations without a word."""
    length, most = (64, 2**40) if rehearsal() else (4096, 160 * 2**20)  # scores of six heads: 384 MiB in fp32
    documents = torch.zeros(1, length, dtype=torch.int64, device=device())
    fused, packed = AttentionMask(documents, single=True), AttentionMask(documents, single=False)
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(7)
        inputs = [torch.randn(1, heads, length, 64, generator=generator).to(device(), dtype) for heads in (6, 2, 2)]
        expected = dense(*inputs, packed)
        own = [one.requires_grad_() for one in inputs]
        if not rehearsal():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        found = dense(*own, fused)
        found.sum().backward()
        if not rehearsal():
            assert torch.cuda.max_memory_allocated() - before < most, f"{dtype}: all scores were in memory"
        _near(found, expected, dtype, f"{dtype}, single documents")


def test_more_variants_than_torch_keeps_are_compiled() -> None:
    """Prevents FlexAttention from falling back in silence to all scores in memory, from the ninth variant on."""
    if rehearsal():
        lengths, most = [16, 32], 2**40
    else:
        lengths, most = [128 * n for n in range(1, 10)] + [4096], 64 * 2**20
        torch.cuda.synchronize()
    for length in lengths:
        mask = AttentionMask(torch.zeros(1, length, dtype=torch.int64, device=device()))
        query, keys = (torch.randn(1, heads, length, 64, device=device()) for heads in (6, 2))
        if not rehearsal():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        found = flex(query, keys, keys, mask, compiled=not rehearsal())
        assert found.shape == query.shape
        if not rehearsal():  # unfused, the scores of the last one would need 384 MiB
            assert torch.cuda.max_memory_allocated() - before < most, f"length {length}: unfused"
