"""The likeliest token by a bf16 head, of which an int8 copy tells what must be read: see c/screen.h.

With a row x and a weight w of K numbers, w = s q + d (q: int8) and x = t p + f (p: integers), the product of integers
s t (q p) differs from w x by at most |d| |x| + |s q| |f|, by the inequality of Cauchy and Schwarz. |f| is bounded when the
row is rounded. The bf16 product sums K terms in fp32, in error by at most 2^-24 K |w| |x|; the integers' sum is exact, and
its conversion and scaling round it four times, by at most 2^-22 |s q| |x|. Four times the sum of both is allowed for, which
pays for the rounding of the bounds themselves. Rows and weights whose sums could overflow or underflow are left to the
whole head.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recycle_ds.inference.native.heads import ChoiceStruct, NativeHead
from recycle_ds.inference.native.library import kernels
from recycle_ds.inference.native.packing import PackedProduct, ProductStruct, quantized

LEAST_OUTPUTS = 4096
"""Outputs of a head from which on reading half of it saves more than the further work costs, with SmolLM2-135M's width."""
MOST_WIDTH = 2048
"""Width up to which rows are rounded finely enough: integers get smaller, so that sums of more of them stay within int32."""
MOST_SCREENED_ROWS = 10
"""Rows up to which it does: with more, arithmetic takes longer than reading. SmolLM2-135M, two threads, in a step: 1 row 0.91
instead of 1.69 ms, 8 rows 1.17 instead of 1.83, 10 rows 1.57 instead of 1.99, 12 rows 1.84 and 1.89."""
_ROUNDED = 1e-3
"""What rounding a row to integers may change, in terms of its length: five times what it does with a width of 576."""
_SMALLEST_ERROR = 1e-18
"""Above what numbers too small for fp32 can change."""
_ROWS_AT_ONCE = 8192


class _ScreenStruct(ctypes.Structure):
    """`Screen` in c/screen.h."""

    _fields_ = (
        ("head", ctypes.c_void_p),
        ("product", ProductStruct),
        ("errors", ctypes.c_void_p),
        ("rounded", ctypes.c_double),
        ("longest", ctypes.c_double),
    )


class ScreenedHead:
    """A head that finds the likeliest tokens without reading all of its weights. Shapes: R rows, V outputs, D width."""

    def __init__(self, weight_VD: Tensor, errors_V: Tensor, head: NativeHead) -> None:
        """weight_VD: what the head was packed from, bf16; it has no bias. errors_V: see `errors_of`."""
        assert weight_VD.dtype == torch.bfloat16
        self._kernels, self._head, self._errors_V = kernels(), head, errors_V
        self._product = PackedProduct(weight_VD, int8=True)
        longest = 1e37 / max(float(weight_VD.detach().float().norm(dim=1).max()), 1e-30)
        self._screen = _ScreenStruct(head.address, self._product.struct, errors_V.data_ptr(), _ROUNDED, longest)
        self._room = torch.empty(0, dtype=torch.uint8)
        self._room_for = (0, 0)
        # of the latest call: their fields are written again by each one
        self._ids, self._choice = (ctypes.c_int64 * 0)(), ChoiceStruct(count=1)
        self._addresses = ctypes.addressof(self._screen), ctypes.addressof(self._choice)

    @classmethod
    def of(cls, weight_VD: Tensor, head: NativeHead) -> ScreenedHead | None:
        """None where it would not be faster, or where a weight is not a number."""
        if len(weight_VD) < LEAST_OUTPUTS or weight_VD.shape[1] > MOST_WIDTH:
            return None
        errors_V = errors_of(weight_VD)
        return cls(weight_VD, errors_V, head) if bool(torch.isfinite(errors_V).all()) else None

    def likeliest(self, states_RD: Tensor) -> list[int]:
        """What `NativeHead.likeliest` finds, and the bits of the same logits decide. states_RD: bf16."""
        assert states_RD.dtype == torch.bfloat16
        rows, threads = len(states_RD), torch.get_num_threads()
        states_RD, choice = states_RD.contiguous(), self._choice
        if rows > self._room_for[0] or threads > self._room_for[1]:
            self._make_room(max(rows, self._room_for[0]), max(threads, self._room_for[1]))
        choice.rows, choice.threads, choice.x = rows, threads, states_RD.data_ptr()
        self._kernels.recycle_ds_likeliest(*self._addresses)
        return self._ids[:rows]

    def _make_room(self, rows: int, threads: int) -> None:
        """Makes room for calls up to this size."""
        self._room_for = rows, threads
        largest = ChoiceStruct(rows, 1, threads)
        needed = self._kernels.recycle_ds_screen_room(self._addresses[0], ctypes.addressof(largest))
        self._room, self._ids = torch.empty(needed + 64, dtype=torch.uint8), (ctypes.c_int64 * rows)()
        self._choice.room, self._choice.ids = -(-self._room.data_ptr() // 64) * 64, ctypes.addressof(self._ids)


def errors_of(weight_VD: Tensor) -> Tensor:
    """By how much the int8 product of a row of length 1 may differ from each output's logit [V], fp32."""
    found = []
    for first in range(0, len(weight_VD), _ROWS_AT_ONCE):
        rows = weight_VD[first : first + _ROWS_AT_ONCE].detach().double()
        codes, scale = quantized(weight_VD[first : first + _ROWS_AT_ONCE])
        kept = codes.double() * scale.double()[:, None]
        sums = 4 * (2.0**-24 * rows.shape[1] * rows.norm(dim=1) + 2.0**-22 * kept.norm(dim=1))
        found.append((rows - kept).norm(dim=1) + _ROUNDED * kept.norm(dim=1) + sums)
    errors_V = 1.001 * torch.cat(found)  # the bounds themselves are rounded
    return errors_V.float().clamp_min(_SMALLEST_ERROR).contiguous()
