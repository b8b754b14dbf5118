"""RecycleGPT on megatron-core and DeepSpeed: pretraining, conversion and recycled decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recycle_ds.inference.api import Answer, Engine
    from recycle_ds.inference.parameters import SamplingParams

__version__ = "0.1.0"
__all__ = ["Answer", "Engine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports what decodes, and torch with it, when it is first asked for (PEP 562)."""
    if name in ("Answer", "Engine", "SamplingParams"):
        from recycle_ds.inference import api

        return getattr(api, name)
    raise AttributeError(f"module 'recycle_ds' has no attribute {name!r}")
