"""What torch.compile is told, for the model and for FlexAttention alike."""

from __future__ import annotations

import torch._dynamo

RECOMPILE_LIMIT = 64
"""Variants of one function. A block has some twelve: packed or single documents x gradients or none x depths of the module."""


def raise_recompile_limit() -> None:
    """Raises PyTorch's limit of variants of one compiled function, 8 by default, to RECOMPILE_LIMIT in this process."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
