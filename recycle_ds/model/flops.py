"""Floating-point operations of a training step, counted from the shapes (a multiply-add is two)."""

from __future__ import annotations

from recycle_ds.config import ModelConfig, RecycleConfig


def parameters(config: ModelConfig, recycle: RecycleConfig) -> int:
    """Number of weights of the full model, without vocabulary padding; a tied head is counted once."""
    assert config.vocab_size is not None
    embedding = config.vocab_size * config.hidden * (1 if config.tied_embeddings else 2)
    total = embedding + config.layers * _block(config) + config.hidden
    if recycle.layers:
        taps = len(recycle.taps) * (config.hidden**2 + config.hidden)
        total += config.hidden + 1 if recycle.confidence else 0
        total += 2 * config.hidden**2 + 3 * config.hidden + taps + recycle.layers * _block(config)
    return total


def training_flops_per_token(config: ModelConfig, recycle: RecycleConfig, seq_length: int) -> float:
    """FLOPs of one token's forward and backward pass. Causal attention counts at its mean length, recomputation does not count.

    With detached gradients, the recycle losses need no weight gradient of the head. A frozen backbone only runs forward. An
    objective that compares with the backbone needs its logits once more, unless it is frozen.
    """
    frozen = recycle.layers > 0 and recycle.gradient == "frozen_backbone"
    backbone = config.layers * block_flops_per_token(config, seq_length) + 6.0 * _head(config)
    if recycle.layers and recycle.objective != "cross_entropy" and not frozen:
        backbone += 2.0 * _head(config)
    return (backbone / 3 if frozen else backbone) + recycle_flops_per_token(config, recycle, seq_length)


def block_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """FLOPs of one token's forward and backward pass through one block of the backbone."""
    return 6.0 * (_block_matrices(config) + _attention(config, seq_length / 2))


def attention_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """The share of attention in `block_flops_per_token`."""
    return 6.0 * _attention(config, seq_length / 2)


def recycle_flops_per_token(
    config: ModelConfig, recycle: RecycleConfig, seq_length: int, *, attention_only: bool = False
) -> float:
    """FLOPs of one token's forward and backward pass through all recycle depths, including the head's losses; or the share of
    attention in them."""
    if not recycle.layers:
        return 0.0
    if attention_only:
        return sum(6.0 * recycle.layers * _attention(config, seq_length / 2 + step) for step in range(recycle.depth))
    stack = 2 * config.hidden**2 + recycle.layers * _block_matrices(config)
    head_passes = 6 if recycle.gradient == "joint" else 4
    head = _head(config)
    if recycle.draft_vocabulary_in_training and recycle.draft_vocabulary is not None:
        head = min(head, recycle.draft_vocabulary * config.hidden)
    total = 6.0 * len(recycle.taps) * config.hidden**2
    for step in range(recycle.depth):
        attention = recycle.layers * _attention(config, seq_length / 2 + step)
        total += 6.0 * (stack + attention) + head_passes * head
    return total


def tail_flops_per_token(config: ModelConfig, recycle: RecycleConfig, seq_length: int) -> float:
    """FLOPs per token after the last block: the head's loss and the recycle module."""
    return 6.0 * _head(config) + recycle_flops_per_token(config, recycle, seq_length)


def _head(config: ModelConfig) -> int:
    assert config.vocab_size is not None
    return config.vocab_size * config.hidden


def _block_matrices(config: ModelConfig) -> int:
    query, kv = config.heads * config.dim_per_head, config.kv_heads * config.dim_per_head
    return config.hidden * (2 * query + 2 * kv) + 3 * config.hidden * config.ffn


def _block(config: ModelConfig) -> int:
    bias = (config.heads + 2 * config.kv_heads) * config.dim_per_head if config.qkv_bias else 0
    norms = 2 * config.hidden + (2 * config.dim_per_head if config.qk_norm else 0)
    return _block_matrices(config) + norms + bias


def _attention(config: ModelConfig, keys: float) -> float:
    """Multiply-adds of q k^T and of the weighted sum of values, for one query over `keys` keys."""
    return 2 * config.heads * config.dim_per_head * keys
