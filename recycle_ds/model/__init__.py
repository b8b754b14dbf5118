"""The model: a LLaMA-type decoder with a recycle module, from megatron-core's tensor-parallel building blocks."""

from recycle_ds.model.build import build_model
from recycle_ds.model.recyclegpt import RecycleGPT

__all__ = ["RecycleGPT", "build_model"]
