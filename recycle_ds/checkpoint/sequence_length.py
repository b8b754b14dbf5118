"""Sequence length to evaluate a model at, if its weights come without the configuration of their training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config import ModelConfig

CONVERTED = "converted"
"""Config section of a converted checkpoint: what its source recorded of the training. A run's config has `training`."""
_WINDOW = 2048


def default_window(model: ModelConfig) -> int:
    """Tokens per sequence if the training's is unknown: at most 2,048, so that a long context is not evaluated in full."""
    return min(_WINDOW, model.max_positions)


def read_window(folder: Path, config: Mapping[str, Any], model: ModelConfig) -> int:
    """Tokens per training sequence, from a portable checkpoint's configuration. Raises CheckpointError if it is invalid."""
    section = next((name for name in ("training", CONVERTED) if name in config), None)
    if section is None:
        return default_window(model)
    values = config[section]
    seq_length = values.get("seq_length") if isinstance(values, Mapping) else None
    if type(seq_length) is not int or seq_length < 1:
        raise CheckpointError(
            f"{folder}: invalid configuration: {section}.seq_length={seq_length!r}: must be an integer above 0"
        )
    return seq_length
