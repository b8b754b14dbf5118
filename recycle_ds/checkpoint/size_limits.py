"""Upper limits for the model sizes in a configuration file.

Without them a damaged value, such as a billion layers, would keep the process busy forever, if only to compute the shapes.
"""

from __future__ import annotations

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config import ModelConfig

WIDTH, POSITIONS = 1 << 24, 1 << 31


def check_sizes(model: ModelConfig, where: str) -> None:
    """Raises CheckpointError if a size exceeds its limit. `where` names the configuration in the message."""
    width, scaling = model.heads * model.dim_per_head, model.rope.scaling
    sizes = {
        "hidden": (model.hidden, WIDTH),
        "heads x head_dim": (width, WIDTH),
        "ffn": (model.ffn, WIDTH),
        "vocab_size": (model.vocab_size or 0, WIDTH),
        "vocab_multiple": (model.vocab_multiple, WIDTH),
        "max_positions": (model.max_positions, POSITIONS),
        "rope.scaling.original_positions": (scaling.original_positions if scaling is not None else 0, POSITIONS),
    }
    for name, (size, limit) in sizes.items():
        if size > limit:
            raise CheckpointError(
                f"{where}: {name} is {_formatted(size)}, above {limit:,}: the configuration is damaged"
            )


def _formatted(size: int) -> str:
    return f"{size:,}" if size < 10**18 else "over 10^18"
