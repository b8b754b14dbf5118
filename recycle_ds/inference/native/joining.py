"""Several states, normalised and joined by one product, in one call: see c/joint.h. Shapes: T tokens, D width."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recycle_ds.inference.native.library import kernels
from recycle_ds.inference.native.packing import PackedProduct, ProductStruct
from recycle_ds.model.norm import RMSNorm

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class _JointStruct(ctypes.Structure):
    """`Joint` in c/joint.h."""

    _fields_ = (
        ("product", ProductStruct),
        ("norms", _POINTER),
        ("pieces", _INTEGER),
        ("width", _INTEGER),
        ("epsilon", ctypes.c_double),
    )


class NativeJoin:
    """W [norm_1(a); norm_2(b); ...] with a packed weight."""

    def __init__(self, norms: Sequence[nn.Module], weight: Tensor, *, int8: bool) -> None:
        """norms: RMSNorms of a width D that is a multiple of 16, one for each input. weight: [E, inputs x D]."""
        self._kernels, self._product = kernels(), PackedProduct(weight, int8=int8)
        first = norms[0]
        assert isinstance(first, RMSNorm)
        weights = []
        for norm in norms:
            assert isinstance(norm, RMSNorm) and norm.epsilon == first.epsilon and len(norm.weight) == len(first.weight)
            weights.append(norm.weight.detach().float().contiguous())
        assert len(weight) % 16 == 0 and weight.shape[1] == len(norms) * len(first.weight)
        addresses = (_POINTER * len(weights))(*(one.data_ptr() for one in weights))
        self._kept = (weights, addresses)
        self._joint = _JointStruct(
            self._product.struct, ctypes.addressof(addresses), len(norms), len(first.weight), first.epsilon
        )
        self._inputs = (_POINTER * len(norms))()
        self.count, self.outputs, self.address = len(norms), len(weight), ctypes.addressof(self._joint)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """bf16 [T, D] each to bf16 [T, E]."""
        inputs = [one.contiguous() for one in inputs]
        rows, threads, outputs = len(inputs[0]), torch.get_num_threads(), self.outputs
        y = torch.empty(rows, outputs, dtype=torch.bfloat16)
        room = torch.empty(4 * ((rows + threads) * self._product.inputs + rows * (outputs + 1)), dtype=torch.uint8)
        for number, one in zip(range(len(self._inputs)), inputs, strict=True):
            self._inputs[number] = one.data_ptr()
        self._kernels.recycle_ds_join(
            ctypes.addressof(self._joint), rows, ctypes.addressof(self._inputs), y.data_ptr(), room.data_ptr(), threads
        )
        return y
