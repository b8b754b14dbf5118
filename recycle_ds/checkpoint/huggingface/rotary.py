"""The rotary embedding in a config.json, read in transformers' order of precedence, and written.

The settings are a block, `rope_scaling` or `rope_parameters`, and keys at the top level. As in transformers 5
(`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict` and `standardize_rope_params`), the first that is given counts:

    block                               rope_scaling unless empty, rope_parameters
    rope_type                           block.rope_type, block.type, "default"
    rope_theta                          block.rope_theta, rope_theta, the family's default
    partial_rotary_factor               block, top level
    original_max_position_embeddings    top level, block, max_position_embeddings
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config import ModelConfig

_RAMP = {"low_frequency_factor": "low_freq_factor", "high_frequency_factor": "high_freq_factor"}
SCALING, PARAMETERS, THETA, ORIGINAL = (
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "original_max_position_embeddings",
)
RENAMED = {
    "rope.theta": THETA,
    "rope.scaling.original_positions": ORIGINAL,
    **{f"rope.scaling.{field}": f"{SCALING}.{key}" for field, key in _RAMP.items()},
    "rope.scaling": SCALING,
    **_RAMP,
}
"""Our keys of the rotary embedding, and the file's, for messages."""
PARTIAL = "partial_rotary_factor"
_KINDS = ("default", "linear", "llama3")
_NUMBERS = (THETA, "factor", "low_freq_factor", "high_freq_factor", ORIGINAL)


def read_rope(tree: Mapping[str, Any], default_theta: float, where: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of our rope section, and notes on values that another one overrides. where: for messages.

    Raises CheckpointError for an invalid or unsupported rotary embedding.
    """
    name, block = _block(tree, where)
    for key in _NUMBERS:
        for scope, value in ((f"{name}.", block.get(key)), ("", tree.get(key))):
            if isinstance(value, bool):
                raise CheckpointError(f"{where}: {scope}{key}={value!r}: must be a number")
    partial = block.get(PARTIAL, tree.get(PARTIAL))
    if isinstance(partial, bool) or partial not in (None, 1):
        raise CheckpointError(f"{where}: {PARTIAL}={partial!r} is not supported, only 1.0")
    nested = [key for key, value in block.items() if isinstance(value, Mapping)]
    if nested:
        raise CheckpointError(f"{where}: {name}.{nested[0]}: rotary embeddings by type of layer are not supported")
    found: dict[str, Any] = {"theta": block.get(THETA, tree.get(THETA, default_theta))}
    kind = block.get("rope_type", block.get("type", "default"))
    if kind not in _KINDS:
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported, only default, linear and llama3")
    notes = _overridden(tree, name, block, kind)
    if kind == "default":
        return found, notes
    scaling = {"kind": kind, "factor": block.get("factor")}
    if kind == "llama3":
        scaling |= {
            **{field: block.get(key) for field, key in _RAMP.items()},
            "original_positions": _original(tree, block),
        }
    absent = [key for key, value in scaling.items() if value is None]
    if absent:
        raise CheckpointError(
            f"{where}: rope type {kind!r}: missing {', '.join(_RAMP.get(key, key) for key in absent)}"
        )
    return found | {"scaling": scaling}, notes


def _block(tree: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """Returns name and content of the block that counts."""
    for name in (SCALING, PARAMETERS):
        if not isinstance(tree.get(name), Mapping | None):
            raise CheckpointError(f"{where}: {name}={tree[name]!r}: must be an object")
    name = SCALING if tree.get(SCALING) else PARAMETERS
    return name, tree.get(name) or {}


def _original(tree: Mapping[str, Any], block: Mapping[str, Any]) -> Any:
    """Returns the context length before scaling. A null is invalid in transformers, and counts as missing."""
    return tree[ORIGINAL] if ORIGINAL in tree else block.get(ORIGINAL, tree["max_position_embeddings"])


def _overridden(tree: Mapping[str, Any], name: str, block: Mapping[str, Any], kind: str) -> list[str]:
    notes = []
    if name == SCALING and tree.get(PARAMETERS) and dict(tree[PARAMETERS]) != dict(block):
        notes.append(f"{SCALING} is used and {PARAMETERS} ignored, as transformers does")
    if THETA in block and THETA in tree and block[THETA] != tree[THETA]:
        notes.append(f"{name}.{THETA}={block[THETA]!r} is used, not {THETA}={tree[THETA]!r}, as transformers does")
    if kind == "llama3" and ORIGINAL in tree and block.get(ORIGINAL, tree[ORIGINAL]) != tree[ORIGINAL]:
        notes.append(f"{ORIGINAL}={tree[ORIGINAL]!r} is used, not that in {name}, as transformers does")
    return notes


def write_scaling(config: ModelConfig) -> dict[str, Any] | None:
    """Returns the block `rope_scaling` of a config.json; None without scaling."""
    scaling = config.rope.scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        ORIGINAL: scaling.original_positions,
    }
