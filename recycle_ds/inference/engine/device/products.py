"""Products of few rows wherever PyTorch's operations compute them, with int8 weights on GPUs too.

A weight in int8 is half of one in bf16 to be read, which is what a step of few tokens waits for. Its scale multiplies the sums,
so that the numbers are those of `torch_products.Product` in int8 but for rounding. Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from recycle_ds.inference.native import torch_products
from recycle_ds.inference.native.packing import quantized

_FEW_ROWS = 64
"""Rows up to which the kernel is used. With more, the weight is first written in the dtype of the rows, as for any product."""


class Int8Kernel(Protocol):
    """x W^T times scale, plus a bias and a residual, in the dtype of x [T, N]."""

    def __call__(
        self, x: Tensor, weight_NK: Tensor, scale_N: Tensor, bias: Tensor | None, residual: Tensor | None, /
    ) -> Tensor: ...


def widened(x: Tensor, weight_NK: Tensor, scale_N: Tensor, bias: Tensor | None, residual: Tensor | None, /) -> Tensor:
    """`Int8Kernel` in PyTorch's operations: int8 numbers are exact in bf16."""
    y = F.linear(x, weight_NK.to(x.dtype)) * scale_N.to(x.dtype)
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def int8_kernel() -> Int8Kernel:
    """Triton's kernel, or `widened` without the package triton."""
    try:
        from recycle_ds.inference.engine.device.int8_kernel import multiply
    except ImportError:
        return widened
    return multiply


class Product(torch_products.Product):
    """y = x W^T + b: see the base class. int8: also on GPUs."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, int8: bool = False) -> None:
        self._kernel: Int8Kernel | None = None
        if int8 and weight.device.type != "cpu":
            self._kernel, self._bias = int8_kernel(), bias
            self._codes_NK, self._scale_N = quantized(weight)
            return
        super().__init__(weight, bias, int8=int8)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, K] to [T, N], plus the residual [T, N]."""
        if self._kernel is None:
            return super().__call__(x, residual)
        kernel = self._kernel if len(x) <= _FEW_ROWS else widened
        return kernel(x, self._codes_NK, self._scale_N, self._bias, residual)
