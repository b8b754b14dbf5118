"""The model: a LLaMA-type decoder with a recycle module, from megatron-core's tensor-parallel building blocks."""

import warnings

with warnings.catch_warnings():
    # without Transformer Engine and Apex, which nothing here needs, megatron-core warns in each of its modules
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    from recycle_ds.model.build import build_model
    from recycle_ds.model.recyclegpt import RecycleGPT

__all__ = ["RecycleGPT", "build_model"]
