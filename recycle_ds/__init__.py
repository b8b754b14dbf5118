"""RecycleGPT on megatron-core and DeepSpeed: pretraining, conversion and recycled decoding."""

__version__ = "0.1.0"
