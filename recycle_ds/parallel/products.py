"""bf16 matrix products on CPUs without bf16 instructions.

On these CPUs PyTorch multiplies bf16 one number at a time, tens of times slower than fp32. Products of at least _FEW_ROWS rows
are instead computed in fp32 from the bf16 operands and rounded once, which is no less accurate. CUDA, CPUs with bf16
instructions, and fp32 use the plain call. Both paths keep the same tensors for the backward pass.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Products of fewer rows are bound by reading the weight, which bf16 halves.
_FEW_ROWS = 16


@torch.compiler.assume_constant_result  # compiled code asks while it is traced, and keeps the answer
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 matrix products."""
    return _has_bf16_products()


@lru_cache(maxsize=1)
def _has_bf16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def upcasts(x: Tensor) -> bool:
    """Whether products of this tensor [..., D] are computed in fp32."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() >= _FEW_ROWS * x.shape[-1]
        and not multiplies_bf16()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, [..., D] by [E, D] to [..., E], in the dtype of x."""
    if upcasts(x):
        return _UpcastLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _UpcastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_fp32 = grad.float()
        rows = grad_fp32.flatten(0, -2)
        grad_x = (grad_fp32 @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias
