"""bf16 products on a CPU without bf16 instructions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recycle_ds.parallel import products


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bf16", lambda: False)


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_product_of_the_same_operands(bias: bool) -> None:
    """Prevents a product in fp32 that rounds more than once or has wrong gradients."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 8, 24, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(40, 24, generator=generator).bfloat16().requires_grad_()
    offset = torch.randn(40, generator=generator).bfloat16().requires_grad_() if bias else None
    direction = torch.randn(5, 8, 40, generator=generator).bfloat16()
    assert products.upcasts(x)
    actual = products.linear(x, weight, offset)
    assert actual.dtype == torch.bfloat16
    inputs = [x, weight] + ([offset] if offset is not None else [])
    gradients = torch.autograd.grad(actual, inputs, direction)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_product = F.linear(exact[0], exact[1], exact[2] if bias else None)
    expected = torch.autograd.grad(exact_product, exact, direction.double())
    for found, wanted in zip((actual, *gradients), (exact_product, *expected), strict=True):
        assert found.dtype == torch.bfloat16
        # a single rounding to eight bits: half a unit in the last place, plus fp32's rounding where sums cancel
        assert torch.allclose(found.double(), wanted.detach(), rtol=2**-8, atol=1e-4)


@pytest.mark.usefixtures("without_instructions")
def test_fp32_and_few_rows_are_not_upcast() -> None:
    """Prevents fp32 tensors, and the few rows of decoding, from being computed with the slower upcast."""
    assert not products.upcasts(torch.zeros(64, 8))
    assert not products.upcasts(torch.zeros(2, 8, dtype=torch.bfloat16))
    assert products.upcasts(torch.zeros(64, 8, dtype=torch.bfloat16))


def test_a_cpu_with_instructions_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a product in fp32 on a CPU on which bf16 is twice as fast."""
    monkeypatch.setattr(products, "multiplies_bf16", lambda: True)
    assert not products.upcasts(torch.zeros(64, 8, dtype=torch.bfloat16))
