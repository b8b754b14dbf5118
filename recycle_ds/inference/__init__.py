"""Decoding: autoregressive, alternate (the paper) and verified (lossless)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recycle_ds.inference.answers import Answer
    from recycle_ds.inference.api import Engine
    from recycle_ds.inference.decoder import Decoder
    from recycle_ds.inference.errors import DecodingError
    from recycle_ds.inference.generation import DecodingInterrupted, Generation
    from recycle_ds.inference.parameters import MODES, SamplingParams
    from recycle_ds.inference.speculation.stopping import TextFilter

_MODULE_OF = {
    "MODES": "parameters",
    "Answer": "answers",
    "Engine": "api",
    "SamplingParams": "parameters",
    "Decoder": "decoder",
    "DecodingError": "errors",
    "DecodingInterrupted": "generation",
    "Generation": "generation",
    "TextFilter": "speculation.stopping",
}
__all__ = [
    "MODES",
    "Answer",
    "Decoder",
    "DecodingError",
    "DecodingInterrupted",
    "Engine",
    "Generation",
    "SamplingParams",
    "TextFilter",
]


def __getattr__(name: str) -> Any:
    """Imports the submodules, and torch with them, on first access (PEP 562)."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"recycle_ds.inference.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'recycle_ds.inference' has no attribute {name!r}")
