"""A mark for tests of the compiled kernels, and small models whose sizes they support."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.inference.native.library import KernelsUnavailable, kernels
from recycle_ds.model import RecycleGPT, build_model


def _unavailable() -> str:
    try:
        kernels()
    except KernelsUnavailable as error:
        return str(error)
    return ""


needs_kernels = pytest.mark.skipif(bool(_unavailable()), reason=f"no compiled kernels: {_unavailable()}")


def bf16_model(
    seed: int = 0, *, int8: bool = False, taps: tuple[int, ...] = (), confidence: bool = False, **changes: Any
) -> RecycleGPT:
    """Random bf16 weights. taps, confidence: of the recycle module. changes: of the configuration."""
    sizes = {
        "layers": 2, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 48, "vocab_size": 7, "max_positions": 96,
        "init_std": 0.3,
    }  # fmt: skip
    config = ModelConfig(**(sizes | changes))
    recycle = RecycleConfig(layers=1, taps=taps, confidence=confidence)
    model = build_model(config, recycle, seed=seed, dtype=torch.bfloat16).eval()
    if confidence:  # its weights begin as zeros
        torch.nn.init.normal_(model.recycle.confidence.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    model.int8 = int8
    return model
