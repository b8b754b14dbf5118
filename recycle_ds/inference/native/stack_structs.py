"""The structures of c/stack.h, field by field."""

from __future__ import annotations

import ctypes

from recycle_ds.inference.native.packing import ProductStruct

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class LayerStruct(ctypes.Structure):
    """`Layer` in c/stack.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, ProductStruct) for name in ("query_key_value", "output", "gate_up", "down")),
        ("rotated", _INTEGER),
    )


class StackStruct(ctypes.Structure):
    """`Stack` in c/stack.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("layers", "cache", "cosine", "sine", "final_norm", "piece_norms", "exchange")),
        ("joined", ProductStruct),
        *((name, _INTEGER) for name in ("count", "pieces", "layer_size")),
        *((name, _INTEGER) for name in ("width", "heads", "kv_heads", "channels", "ffn")),
        ("epsilon", ctypes.c_double),
        ("joint", _POINTER),
        ("joined_states", _POINTER),
    )


class StepStruct(ctypes.Structure):
    """`Step` in c/stack.h."""

    _fields_ = (
        *((name, _INTEGER) for name in ("tokens", "longest", "threads", "shift", "copied")),
        *((name, _POINTER) for name in ("slots", "positions", "lowest", "table", "blocks", "paths", "moved")),
        *((name, _POINTER) for name in ("inputs", "added", "tapped", "states", "room", "contents")),
    )


class ContentsStruct(ctypes.Structure):
    """`Contents` in c/stack.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("embedding", "ids", "states")),
        ("columns", _INTEGER),
    )
