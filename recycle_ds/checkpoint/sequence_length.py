"""How long a sequence a model is evaluated at, where its weights come without the run that made them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config import ModelConfig

CONVERTED = "converted"
"""Section of a conversion's configuration: what its source knew of the training. A run's has `training`."""
_WINDOW = 2048


def default_window(model: ModelConfig) -> int:
    """Tokens in a sequence where the length of the training's is not known: a long context is not evaluated whole."""
    return min(_WINDOW, model.max_positions)


def read_window(folder: Path, config: Mapping[str, Any], model: ModelConfig) -> int:
    """Tokens in a sequence of the training, as a portable checkpoint's configuration says. Raises CheckpointError."""
    section = next((name for name in ("training", CONVERTED) if name in config), None)
    if section is None:
        return default_window(model)
    held = config[section]
    found = held.get("seq_length") if isinstance(held, Mapping) else None
    if type(found) is not int or found < 1:
        raise CheckpointError(
            f"{folder}: its configuration is not valid: {section}.seq_length={found!r}: must be a whole number above 0"
        )
    return found
