"""Checkpoints of megatron.core.dist_checkpointing (torch_dist) with the names of its GPTModel; its MTP layer is our module."""
