"""The likeliest token by a bf16 head, of which an int8 copy tells what must be read: see c/screen.h.

With a row x and a weight w of K numbers, w = s q + d (q: int8) and x = t p + f (p: integers), the product of integers
s t (q p) differs from w x by at most |d| |x| + |s q| |f|, by the inequality of Cauchy and Schwarz. The sums of both, in
fp32, differ from the exact ones by less than 2^-23 K |w| |x|.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recycle_ds.inference.native.heads import ChoiceStruct, NativeHead
from recycle_ds.inference.native.library import kernels
from recycle_ds.inference.native.packing import PackedProduct, ProductStruct, quantized

LEAST_OUTPUTS = 4096
"""Outputs of a head from which on reading half of it saves more than the further work costs."""
MOST_ROWS = 8
"""Rows up to which it does: with more, arithmetic takes longer than reading. SmolLM2-135M, two threads: 1 row 0.68 instead of
1.14 ms, 6 rows 1.00 instead of 1.29, 12 rows 1.91 instead of 1.67."""
_ROUNDED = 1e-3
"""What rounding a row to integers may change, in terms of its length: five times what it does in practice."""
_ROWS_AT_ONCE = 8192


class _ScreenStruct(ctypes.Structure):
    """`Screen` in c/screen.h."""

    _fields_ = (
        ("head", ctypes.c_void_p),
        ("product", ProductStruct),
        ("errors", ctypes.c_void_p),
        ("rounded", ctypes.c_double),
    )


class ScreenedHead:
    """A head that finds the likeliest tokens without reading all of its weights. Shapes: R rows, V outputs, D width."""

    def __init__(self, weight_VD: Tensor, head: NativeHead) -> None:
        """weight_VD: what the head was packed from, bf16; it has no bias."""
        self._kernels, self._head = kernels(), head
        self._product = PackedProduct(weight_VD, int8=True)
        self._errors_V = _errors(weight_VD)
        self._screen = _ScreenStruct(head.address, self._product.struct, self._errors_V.data_ptr(), _ROUNDED)
        self._room = torch.empty(0, dtype=torch.uint8)
        self._room_for = (0, 0)

    def likeliest(self, states_RD: Tensor) -> list[int]:
        """What `NativeHead.likeliest` finds, and the bits of the same logits decide. states_RD: bf16."""
        rows, threads = len(states_RD), torch.get_num_threads()
        ids_R = torch.empty(rows, dtype=torch.int64)
        states_RD = states_RD.contiguous()
        choice = ChoiceStruct(rows, 1, threads, states_RD.data_ptr(), None, ids_R.data_ptr(), None, None, None)
        if rows > self._room_for[0] or threads > self._room_for[1]:
            self._room_for = max(rows, self._room_for[0]), max(threads, self._room_for[1])
            largest = ChoiceStruct(self._room_for[0], 1, self._room_for[1])
            needed = self._kernels.recycle_ds_screen_room(ctypes.addressof(self._screen), ctypes.addressof(largest))
            self._room = torch.empty(needed + 64, dtype=torch.uint8)
        choice.room = -(-self._room.data_ptr() // 64) * 64
        self._kernels.recycle_ds_likeliest(ctypes.addressof(self._screen), ctypes.addressof(choice))
        found: list[int] = ids_R.tolist()
        return found


def _errors(weight_VD: Tensor) -> Tensor:
    """By how much the int8 product of a row of length 1 may differ from each output's logit [V], fp32."""
    found = []
    for first in range(0, len(weight_VD), _ROWS_AT_ONCE):
        rows = weight_VD[first : first + _ROWS_AT_ONCE].detach().double()
        codes, scale = quantized(weight_VD[first : first + _ROWS_AT_ONCE])
        kept = codes.double() * scale.double()[:, None]
        sums = 2.0**-23 * rows.shape[1] * 2 * (rows.norm(dim=1) + kept.norm(dim=1))
        found.append((rows - kept).norm(dim=1) + _ROUNDED * kept.norm(dim=1) + sums)
    errors_V = 1.001 * torch.cat(found)  # the bounds themselves are rounded
    return errors_V.float().contiguous()
