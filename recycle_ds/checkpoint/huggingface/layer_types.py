"""What differs from layer to layer: sliding attention windows, and layers without rotary embedding (SmolLM3).

A window is not computed. Up to its length, a window attends to everything, so the model is limited to that many positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError

WINDOW, USED, FIRST, TYPES = "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"
UNROTATED, INTERVAL = "no_rope_layers", "no_rope_layer_interval"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_DEFAULT_WINDOW, _DEFAULT_FIRST, _DEFAULT_INTERVAL = 4096, 28, 4
"""Defaults of transformers. SmolLM3's window is null."""


def read_window(tree: Mapping[str, Any], model_type: str, layers: int, where: str) -> tuple[int | None, list[str]]:
    """Returns the smallest attention window of a layer in positions, None if all attend to everything, and notes.

    Raises CheckpointError for invalid settings, and for types of layers that are not supported.
    """
    if model_type == "llama":  # transformers ignores a window in its config; other programs may not
        return None, []
    if model_type == "mistral":
        return _size(tree, _DEFAULT_WINDOW, where), []
    used = tree.get(USED, False)
    if not isinstance(used, bool):
        raise CheckpointError(f"{where}: {USED}={used!r}: must be true or false")
    window = _size(tree, None if model_type == "smollm3" else _DEFAULT_WINDOW, where) if used else None
    types = tree.get(TYPES)
    if types is None:
        sliding = window is not None and any(_slides(tree, model_type, layers, where))
    else:
        sliding = _SLIDING in _checked_types(types, layers, where)
        if sliding and window is None:
            raise CheckpointError(
                f"{where}: {TYPES} has {_SLIDING!r}, but {USED}={used} and {WINDOW}={tree.get(WINDOW)!r} give no window: "
                f"name {_FULL!r} for all layers, or set both"
            )
    if sliding:
        return window, []
    return None, [f"{USED}=true applies to no layer: all layers attend to everything"] if used else []


def _size(tree: Mapping[str, Any], default: int | None, where: str) -> int | None:
    window = tree.get(WINDOW, default)
    if window is not None and (type(window) is not int or window < 1):
        raise CheckpointError(f"{where}: {WINDOW}={window!r}: must be a whole number above 0, or null")
    return window


def _checked_types(types: Any, layers: int, where: str) -> list[str]:
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(
            f"{where}: {TYPES}={str(types)[:60]}: must name the attention of each of the {layers} layers"
        )
    wrong = [one for one in types if one not in (_FULL, _SLIDING)]
    if wrong:
        raise CheckpointError(f"{where}: {TYPES} has {wrong[0]!r}: supported are {_FULL!r} and {_SLIDING!r}")
    return types


def _slides(tree: Mapping[str, Any], model_type: str, layers: int, where: str) -> list[bool]:
    """Whether each layer has a window, if the config does not name their types."""
    if model_type == "smollm3":
        unrotated = read_unrotated(tree, layers, where)
        return [layer in unrotated for layer in range(layers)]
    first = tree.get(FIRST, _DEFAULT_FIRST)
    if type(first) is not int:
        raise CheckpointError(f"{where}: {FIRST}={first!r}: must be a whole number")
    return [layer >= first for layer in range(layers)]


def read_unrotated(tree: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    """Returns the layers of a SmolLM3 without rotary embedding. Raises CheckpointError for invalid settings."""
    listed = tree.get(UNROTATED)
    if listed is None:
        interval = tree.get(INTERVAL, _DEFAULT_INTERVAL)
        if type(interval) is not int or interval < 1:
            raise CheckpointError(f"{where}: {INTERVAL}={interval!r}: must be a whole number above 0")
        return tuple(layer for layer in range(layers) if (layer + 1) % interval == 0)
    if not isinstance(listed, list) or len(listed) < layers or any(type(one) is not int for one in listed):
        raise CheckpointError(
            f"{where}: {UNROTATED}={str(listed)[:60]}: must have a 1 (rotated) or 0 for each of the {layers} layers"
        )
    return tuple(layer for layer in range(layers) if not listed[layer])
