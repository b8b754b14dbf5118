"""Sampling tokens from logits in one call: see c/choice.h. Shapes: R rows, V token ids."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from recycle_ds.inference.native.library import kernels
from recycle_ds.inference.parameters import TokenSampling

_PARTS = 8


class _Rule(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("inverse", "top_p", "min_p")),
        *((name, ctypes.c_int64) for name in ("top_k", "key")),
    )


class _Race(ctypes.Structure):
    _fields_ = (
        ("highest", ctypes.c_float * _PARTS),
        ("limit", ctypes.c_float),
        ("score", ctypes.c_float * _PARTS),
        ("winner", ctypes.c_int64 * _PARTS),
    )


def sample(logits_RV: Tensor, params: Sequence[TokenSampling], keys: Sequence[int], first: int = 0) -> list[int]:
    """The token of every row, by temperature, top-k, top-p, min-p and the counter-based random numbers of its key.

    The same distributions and the same random numbers as `choose` in speculation/sampling.py, so the same tokens but for
    ties within rounding. logits_RV: fp32, on the CPU, already adjusted, of the ids first, first + 1, ... params: with a
    temperature above 0. keys: see `noise.key`. -1 for a row in which no token can be chosen. Raises KernelsUnavailable.
    """
    library = kernels()
    rows, count = logits_RV.shape
    logits_RV = logits_RV.contiguous()
    rules = (_Rule * rows)(
        *(
            _Rule(1.0 / one.temperature, one.top_p, one.min_p, one.top_k if one.top_k < count else 0, key)
            for one, key in zip(params, keys, strict=True)
        )
    )
    limited = any(one.top_k or one.top_p < 1 for one in params)
    room = torch.empty(rows * count if limited else 0)
    races, winners = (_Race * rows)(), (ctypes.c_int64 * rows)()
    library.recycle_ds_sample(
        logits_RV.data_ptr(), rows, count, first, rules, races, room.data_ptr(), winners, torch.get_num_threads()
    )
    return list(winners)
