"""int8 products of PyTorch's operations."""

from __future__ import annotations

import pytest
import torch

from recycle_ds.inference.native.packing import quantized
from recycle_ds.inference.native.torch_products import Product


@pytest.mark.parametrize("inputs", [8, 16, 24, 40, 31, 576])
@pytest.mark.parametrize("rows", [1, 5])
def test_int8_products_of_any_width_are_right(inputs: int, rows: int) -> None:
    """Prevents wrong numbers and crashes where the inputs, as those of a tensor rank, are no multiple of 16: PyTorch's
    operation reads past their end."""
    torch.manual_seed(0)
    weight, bias = torch.randn(8, inputs), torch.randn(8).bfloat16()
    x, residual = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, 8).bfloat16()
    codes, scale = quantized(weight)
    expected = x.float() @ (codes.float() * scale.float()[:, None]).T
    torch.testing.assert_close(Product(weight, int8=True)(x).float(), expected, atol=0.02 * inputs**0.5, rtol=0.01)
    with_both = Product(weight, bias, int8=True)(x, residual).float()
    torch.testing.assert_close(with_both, expected + bias + residual, atol=0.02 * inputs**0.5, rtol=0.02)
