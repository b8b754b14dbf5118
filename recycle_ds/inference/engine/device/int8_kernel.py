"""`products.Int8Kernel` in Triton: int8 weights become bf16 in registers. Importing this needs the package triton.

A program computes some outputs of all rows. Shapes as in products.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS, _INPUTS = 32, 128
"""Outputs of a program, and inputs that it reads at once."""
# Products of the tensor cores have at least 16 rows.
_LEAST = 16


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, scale, bias, residual, y, rows, inputs, outputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    row, step = tl.arange(0, ROWS), tl.arange(0, INPUTS)
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, inputs, INPUTS):
        at = first + step
        inside = at < inputs
        left = tl.load(x + row[:, None] * inputs + at[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        codes = tl.load(
            weight + output[:, None] * inputs + at[None, :], mask=(output < outputs)[:, None] & inside[None, :], other=0
        )
        if WIDEN:
            left = left.to(tl.float32)
        sums += tl.dot(left, tl.trans(codes.to(left.dtype)), input_precision=PRECISION)
    there = output < outputs
    sums = sums * tl.load(scale + output, mask=there, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        sums += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * outputs + output[None, :]
    used = (row < rows)[:, None] & there[None, :]
    if RESIDUAL:
        sums += tl.load(residual + place, mask=used, other=0.0).to(tl.float32)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=used)


def multiply(x: Tensor, weight_NK: Tensor, scale_N: Tensor, bias: Tensor | None, residual: Tensor | None, /) -> Tensor:
    """See `products.Int8Kernel`."""
    rows, (outputs, inputs) = len(x), weight_NK.shape
    x = x.contiguous()
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # Triton takes the thread's own device, whatever its arguments are on
        _multiply[(triton.cdiv(outputs, _OUTPUTS),)](
            x, weight_NK, scale_N, scale_N if bias is None else bias.contiguous(),
            y if residual is None else residual.contiguous(), y, rows, inputs, outputs,
            ROWS=max(triton.next_power_of_2(rows), _LEAST), OUTPUTS=_OUTPUTS, INPUTS=_INPUTS,
            BIAS=bias is not None, RESIDUAL=residual is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            WIDEN=x.device.type == "cpu",  # the interpreter multiplies the bits of bf16 numbers as if they were integers
        )  # fmt: skip
    return y
