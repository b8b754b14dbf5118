"""Random cases for products with int8 weights."""

from __future__ import annotations

from itertools import product

import torch

from recycle_ds.inference.engine.device.products import Int8Kernel
from recycle_ds.inference.native.packing import quantized


def check_products(multiply: Int8Kernel, device: str = "cpu") -> None:
    """Asserts that products are those of the rounded weight in fp64, with and without bias and residual."""
    shapes = ((1, 40, 24), (5, 300, 70), (33, 128, 32))
    for (rows, inputs, outputs), dtype, more in product(shapes, (torch.float32, torch.bfloat16), (False, True)):
        generator = torch.Generator().manual_seed(rows)
        draws = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
        x, weight, bias, residual = (torch.randn(size, generator=generator).to(dtype).to(device) for size in draws)
        codes, scale = quantized(weight)
        expected = x.double() @ (codes.double() * scale.double()[:, None]).t()
        expected = expected + bias + residual if more else expected
        found = multiply(x, codes, scale, bias if more else None, residual if more else None)
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * inputs**0.5)
