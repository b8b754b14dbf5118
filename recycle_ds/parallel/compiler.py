"""What torch.compile is told, for the model and for FlexAttention alike."""

from __future__ import annotations

import os

import torch._dynamo
import torch._inductor.config as inductor

RECOMPILE_LIMIT = 64
"""Variants of one function. A block has some twelve: packed or single documents x gradients or none x depths of the module."""


def raise_recompile_limit() -> None:
    """Raises PyTorch's limit of variants of one compiled function, 8 by default, to RECOMPILE_LIMIT in this process."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)


def share_compile_processes(ranks: int) -> None:
    """Leaves each rank of a host its share of the processes that Inductor compiles with. ranks: on this host; 0 if unknown.

    Inductor starts as many as the host has cores, up to 32, in every rank, each with PyTorch in its memory. The variable
    TORCHINDUCTOR_COMPILE_THREADS takes precedence.
    """
    if ranks > 1 and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        share = max((os.cpu_count() or 1) // ranks, 1)
        own = inductor.compile_threads or 1  # fewer than the host has cores if this rank is bound to some of them
        inductor.compile_threads = min(own, share)
