"""The portable checkpoint: safetensors and JSON, canonical unsharded names, any layout to any layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recycle_ds.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from recycle_ds.checkpoint.loading import LoadedModel, load_model

__all__ = ["CheckpointError", "LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    """Imports what loads a model, and torch with it, when it is first asked for (PEP 562)."""
    if name in ("LoadedModel", "load_model"):
        from recycle_ds.checkpoint import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'recycle_ds.checkpoint' has no attribute {name!r}")
