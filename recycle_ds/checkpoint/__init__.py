"""The portable checkpoint: safetensors and JSON, canonical unsharded names, any layout to any layout."""

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.loading import LoadedModel, load_model

__all__ = ["CheckpointError", "LoadedModel", "load_model"]
