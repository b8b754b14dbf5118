"""Choice of tokens by an output head in the compiled kernels: see c/heads.h. Shapes: R rows, D width, K tokens of each row."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recycle_ds.inference.native.library import kernels
from recycle_ds.inference.native.packing import PackedProduct, ProductStruct, address

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class _HeadStruct(ctypes.Structure):
    """`Head` in c/heads.h."""

    _fields_ = (("product", ProductStruct), ("ids", _POINTER), ("barred", _POINTER), ("barred_count", _INTEGER))


class ChoiceStruct(ctypes.Structure):
    """`Choice` in c/heads.h."""

    _fields_ = (
        *((name, _INTEGER) for name in ("rows", "count", "threads")),
        *((name, _POINTER) for name in ("x", "factors", "ids", "log_probabilities", "room", "keys")),
    )


class NativeHead:
    """A packed head whose logits are reduced to the likeliest tokens while they are computed."""

    def __init__(self, product: PackedProduct, ids: Tensor | None, barred: Tensor | None) -> None:
        """ids: token ids of the outputs, int64, ascending; None for 0, 1, ... barred: outputs that are never chosen, int64,
        ascending; None for none."""
        self._kernels = kernels()
        self._ids = None if ids is None else ids.contiguous()
        self._barred = None if barred is None else barred.contiguous()
        barred_count = 0 if barred is None else len(barred)
        self.allowed = product.outputs - barred_count
        """Outputs that may be chosen."""
        self._product = product  # keeps the weight
        self._head = _HeadStruct(product.struct, address(self._ids), address(self._barred), barred_count)
        self.address = ctypes.addressof(self._head)
        self._room = torch.empty(0, dtype=torch.uint8)
        self._room_for = (0, 0, 0)

    def room(self, choice: ChoiceStruct) -> int:
        """Bytes that choices of a size need."""
        needed: int = self._kernels.recycle_ds_choice_room(self.address, ctypes.addressof(choice))
        return needed

    def likeliest(self, states_RD: Tensor) -> list[int]:
        """The likeliest token id of each row by the logits that the product gives; among equal ones the lowest.

        states_RD: bf16."""
        ids_R = torch.empty(len(states_RD), dtype=torch.int64)
        self._choose(states_RD, 1, None, ids_R, None)
        found: list[int] = ids_R.tolist()
        return found

    def candidates(
        self, states_RD: Tensor, count: int, inverse_temperature_R: Tensor | None, keys_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The `count` likeliest token ids of each row [R, K], int64, in descending order, among equal ones the lowest first,
        and their log probabilities [R, K], fp32, over all tokens that are not barred; K is less than `count` if these are
        fewer. states_RD: bf16. inverse_temperature_R: fp32, positive; None for 1. keys_R: int64, see `noise.key`; a row with
        one that is not 0 has, in place of its logits, what sampling with these random numbers takes the maximum of."""
        rows, count = len(states_RD), min(count, self.allowed)
        ids_RK = torch.empty(rows, count, dtype=torch.int64)
        log_probabilities_RK = torch.empty(rows, count)
        self._choose(states_RD, count, inverse_temperature_R, ids_RK, log_probabilities_RK, keys_R)
        return ids_RK, log_probabilities_RK

    def _choose(
        self,
        states_RD: Tensor,
        count: int,
        factors_R: Tensor | None,
        ids: Tensor,
        log_probabilities: Tensor | None,
        keys_R: Tensor | None = None,
    ) -> None:
        assert states_RD.dtype == torch.bfloat16 and (factors_R is None or factors_R.dtype == torch.float32)
        states_RD = states_RD.contiguous()
        factors_R = None if factors_R is None else factors_R.contiguous()
        size = (len(states_RD), count, torch.get_num_threads())
        choice = ChoiceStruct(
            *size, states_RD.data_ptr(), address(factors_R), ids.data_ptr(), address(log_probabilities),
            -(-self._room.data_ptr() // 64) * 64, address(keys_R),
        )  # fmt: skip
        choice_address = ctypes.addressof(choice)
        room = self._room_for
        if size[0] > room[0] or size[1] > room[1] or size[2] > room[2]:
            rows, count, threads = (max(pair) for pair in zip(size, room, strict=True))
            self._room_for = rows, count, threads
            largest = ChoiceStruct(rows, count, threads)
            self._room = torch.empty(self.room(largest) + 64, dtype=torch.uint8)
            choice.room = -(-self._room.data_ptr() // 64) * 64
        self._kernels.recycle_ds_choose(self.address, choice_address)
