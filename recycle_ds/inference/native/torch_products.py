"""Products of few rows and norms in PyTorch's operations: for fp32, GPUs, and ranks and machines without the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recycle_ds.inference.native.packing import quantized
from recycle_ds.model.norm import RMSNorm
from recycle_ds.parallel import products

_LARGE = 2**20
"""Elements of an fp32 weight from which on it is packed."""
_INT8_STEP = 16
"""Inputs that PyTorch's int8 product takes at once. It reads past the end of rows that are no multiple of them."""


class Product:
    """y = x W^T + b for a few rows x [T, D]. The weight is packed on CPUs where that is faster, and not copied
    elsewhere. int8: the weight is rounded to int8, with a scale for each output."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, int8: bool = False) -> None:
        self._weight, self._bias = weight.detach(), bias
        self._scale: Tensor | None = None
        self._packed = _is_faster_packed(weight) and not int8
        if int8:
            codes, self._scale = quantized(weight)
            self._missing = -codes.shape[1] % _INT8_STEP
            self._weight = F.pad(codes, (0, self._missing))
        elif self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, 1)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, D] to [T, E], plus the residual [T, E]."""
        if self._scale is not None:
            x = F.pad(x, (0, self._missing)) if self._missing else x.contiguous()
            y = torch._weight_int8pack_mm(x, self._weight, self._scale)
            y = y if self._bias is None else y + self._bias
            return y if residual is None else y + residual
        if not self._packed:
            if residual is not None and self._bias is None and not products.upcasts(x):
                return torch.addmm(residual, x, self._weight.t())
            y = products.linear(x, self._weight, self._bias)
            return y if residual is None else y + residual
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")


def _is_faster_packed(weight: Tensor) -> bool:
    if weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return products.multiplies_bf16()
    # fp32 products of smaller matrices are faster in MKL: calling oneDNN takes 15 microseconds
    return weight.dtype == torch.float32 and weight.numel() >= _LARGE


class Norm:
    """RMSNorm. On CPUs it is computed as the layer norm of (x, -x), whose mean is 0 and whose variance is the mean square of
    x: one operation where PyTorch's RMSNorm takes five, which made decoding with sixteen sequences 9 % faster."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, RMSNorm)
        self._weight, self._epsilon = norm.weight.detach(), norm.epsilon
        self._width = len(self._weight)
        self._doubled = torch.cat((self._weight, self._weight)) if self._weight.device.type == "cpu" else None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        if self._doubled is None:
            return F.rms_norm(x, (self._width,), self._weight, self._epsilon)
        pair = F.layer_norm(torch.cat((x, -x), dim=-1), (2 * self._width,), self._doubled, None, self._epsilon)
        return pair[..., : self._width].contiguous()


class TorchJoin:
    """W [norm_1(a); norm_2(b); ...]."""

    def __init__(self, norms: Sequence[nn.Module], product: Callable[[Tensor], Tensor]) -> None:
        """norms: one for each input. product: [T, inputs x D] to [T, E]."""
        self._norms, self._product = [Norm(norm) for norm in norms], product

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """[T, D] each to [T, E]."""
        normed = [norm(state) for norm, state in zip(self._norms, inputs, strict=True)]
        return self._product(torch.cat(normed, dim=-1)).to(normed[0].dtype)
