"""Checkpoints of megatron.core.dist_checkpointing (torch_dist) with GPTModel's names; its MTP layer is the recycle module."""
