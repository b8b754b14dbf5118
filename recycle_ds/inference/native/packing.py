"""Weights in the order in which the kernels read them, in bf16 or int8. Shapes: N outputs, K inputs, T rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recycle_ds.inference.native.arena import Arena
from recycle_ds.inference.native.library import kernels

_PANEL = 32
"""Outputs that are computed together; as in c/products.h."""
_LARGEST = 127
_OFFSET = 128
"""Added to inputs of 8 bits, which the kernels read as unsigned."""
_INT32 = 2**31 - 1
_INT16 = 2**15 - 1


class ProductStruct(ctypes.Structure):
    """`Product` in c/products.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("limit", ctypes.c_int64),
        ("gated", ctypes.c_int64),
    )


def quantized(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights [N, K] and their scales [N], bf16: W is about int8 times scale, each rounded to nearest.

    The scale is the smallest one in bf16 with which the row's largest weight fits.
    """
    largest_N = weight_NK.detach().float().abs().amax(1).clamp_min(1e-30)
    scale_N = (largest_N / _LARGEST).bfloat16()
    too_small = scale_N.float() * (_LARGEST + 0.5) < largest_N
    scale_N = torch.where(too_small, (scale_N.float() * (1 + 2**-7)).bfloat16(), scale_N)
    rounded_NK = (weight_NK.detach().float() / scale_N.float()[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return rounded_NK.to(torch.int8), scale_N


class PackedProduct:
    """y = x W^T + b for a few rows x, in a layout of which every byte is read once, in order.

    No row depends on the others, nor on their number: a call over many rows gives the bits of calls over one.
    """

    def __init__(
        self,
        weight_NK: Tensor,
        bias_N: Tensor | None = None,
        *,
        int8: bool = False,
        coarse: bool = False,
        gated: bool = False,
        arena: Arena | None = None,
    ) -> None:
        """Packs a weight in bf16, or rounded to int8. coarse: of int8 products, whether inputs are rounded to 8 bits too,
        not to 16. gated: the first half of the rows are gates g, the other half values u, and the product returns silu(g) u.
        arena: where the packed weight goes. K, and with `gated` N / 2, are multiples of 16. Raises KernelsUnavailable."""
        assert int8 or not coarse
        self._kernels = kernels()
        self.outputs, self.inputs = weight_NK.shape[0] // (2 if gated else 1), weight_NK.shape[1]
        codes_NK, scale_N = quantized(weight_NK) if int8 else (weight_NK.detach().bfloat16(), None)
        self.weight = (arena or Arena()).place(self._panels(codes_NK, gated, 4 if coarse else 2))
        self._scale = None if scale_N is None else self._panels(scale_N.float()[:, None], gated).flatten()
        self._bias = None if bias_N is None else self._panels(bias_N.detach().float()[:, None], gated).flatten()
        offsets_N1 = -_OFFSET * codes_NK.sum(1, keepdim=True, dtype=torch.int32) if coarse else None
        self._start = None if offsets_N1 is None else self._panels(offsets_N1, gated).flatten()
        # sums of K products stay within int32
        limit = min(_INT16, _INT32 // (_LARGEST * self.inputs)) if int8 else 0
        assert coarse or not int8 or limit > _LARGEST, "the kernels would take them for inputs of 8 bits"
        self.struct = ProductStruct(
            self.weight.data_ptr(), address(self._scale), address(self._bias), address(self._start), self.inputs,
            self.outputs, _LARGEST if coarse else limit, gated,
        )  # fmt: skip

    @staticmethod
    def _panels(rows_NK: Tensor, gated: bool, group: int = 2) -> Tensor:
        """[N, K] to [panels, K / group, 32, group]; a column [N, 1] to [panels, 32]."""
        if gated:
            gates, values = rows_NK.unflatten(0, (2, -1, _PANEL // 2))
            rows_NK = torch.stack((gates, values), dim=1).flatten(0, 2)
        padding = -len(rows_NK) % _PANEL
        rows_NK = torch.cat((rows_NK, rows_NK.new_zeros(padding, rows_NK.shape[1])))
        if rows_NK.shape[1] == 1:
            return rows_NK.view(-1, _PANEL).contiguous()
        return rows_NK.view(-1, _PANEL, rows_NK.shape[1] // group, group).transpose(1, 2)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """bf16 [T, K] to fp32 [T, N]."""
        rows, threads = len(x_TK), torch.get_num_threads()
        x_TK = x_TK.contiguous()
        y_TN = torch.empty(rows, self.outputs)
        room = torch.empty(4 * rows + 4 * threads * self.inputs + 2 * rows * self.inputs, dtype=torch.uint8)
        self._kernels.recycle_ds_multiply(
            ctypes.byref(self.struct), rows, x_TK.data_ptr(), y_TN.data_ptr(), room.data_ptr(), threads
        )
        return y_TN


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers are; the caller keeps the tensor."""
    return None if tensor is None else tensor.data_ptr()
