"""Packed products against plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recycle_ds.inference.native.packing import PackedProduct, quantized
from tests.unit.inference.native.kernels import needs_kernels

KINDS: dict[str, dict[str, bool]] = {"bf16": {}, "int8": {"int8": True}, "coarse": {"int8": True, "coarse": True}}


def _exact(weight: torch.Tensor, x: torch.Tensor, kind: str) -> torch.Tensor:
    """x W^T in fp64, of the numbers that a product of some kind reads; `int8` ones round x so little that it is left out."""
    if kind == "bf16":
        return x.double() @ weight.double().t()
    codes, scale = quantized(weight)
    if kind == "coarse":
        step = x.float().abs().amax(1, keepdim=True) / 127
        x = (x.float() * (1 / step)).round() * step
    return x.double() @ (codes.double() * scale.double()[:, None]).t()


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (16, 32), (33, 48), (97, 576), (64, 1536)])
def test_every_number_of_rows_gives_the_product(outputs: int, inputs: int, kind: str) -> None:
    """Prevents a wrong output in the last panel or in a tile of any height, and one that depends on the other rows."""
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    bias = torch.randn(outputs, generator=generator).bfloat16()
    x = (torch.randn(41, inputs, generator=generator) * torch.logspace(-2, 2, 41)[:, None]).bfloat16()
    product = PackedProduct(weight, bias, **KINDS[kind])
    expected = _exact(weight, x, kind) + bias.double()
    found = product(x)
    size = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) + 1
    assert ((found - expected).abs() / size).max() < (3e-4 if kind == "int8" else 1e-6)
    for rows in (*range(1, 14), 24):
        assert torch.equal(product(x[:rows]), found[:rows]), rows


@needs_kernels
def test_inputs_of_8_bits_at_their_bounds() -> None:
    """Prevents sums that are cut off where all weights and inputs are at their largest, and a row of zeros that is not zero."""
    weight = torch.ones(40, 4096).bfloat16() * torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    x = torch.stack((torch.ones(4096), -torch.ones(4096), torch.zeros(4096))).bfloat16()
    found = PackedProduct(weight, int8=True, coarse=True)(x)
    _, scale = quantized(weight)
    expected = 4096 * 127 * scale.float() * torch.tensor([1.0, -1.0]).repeat(20)
    assert torch.allclose(found, torch.stack((expected, -expected, torch.zeros(40))), rtol=1e-6)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_gated_product(kind: str) -> None:
    """Prevents gates and values from being paired wrongly, and an inaccurate silu at large and small arguments."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2 * 48, 64, generator=generator).bfloat16()
    x = (torch.randn(9, 64, generator=generator) * torch.logspace(-3, 1, 9)[:, None]).bfloat16()
    gates, values = _exact(weight, x, kind).chunk(2, dim=-1)
    found = PackedProduct(weight, gated=True, **KINDS[kind])(x)
    error = (found - F.silu(gates) * values).abs() / (1 + values.abs() * (1 + gates.abs()))
    assert error.max() < (3e-3 if kind == "int8" else 1e-5)


def test_rounding_to_int8_is_to_nearest() -> None:
    """Prevents a row's largest weight from being cut off, a row of zeros from becoming NaN, and errors beyond half a step."""
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0
    codes, scale = quantized(weight)
    assert codes.dtype == torch.int8 and scale.dtype == torch.bfloat16
    assert ((codes.float() * scale.float()[:, None] - weight).abs() <= scale.float()[:, None] * 0.5001).all()
    assert codes.abs().amax(1)[torch.arange(50) != 7].min() >= 126
