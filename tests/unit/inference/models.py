"""Tiny models and a detokeniser for the decoding tests."""

from __future__ import annotations

from functools import lru_cache

import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.model import RecycleGPT, build_model

LETTERS = "abcdefghijklmnop"


@lru_cache(maxsize=64)
def random_model(
    vocab_size: int = 6,
    seed: int = 0,
    *,
    layers: int = 2,
    recycle_layers: int = 1,
    max_positions: int = 48,
    std: float = 0.6,
) -> RecycleGPT:
    """Random weights, large enough that the most likely token changes from position to position.

    In a small vocabulary the module agrees with the backbone by chance: some drafts are accepted, some rejected.
    """
    config = ModelConfig(
        layers=layers,
        hidden=16,
        heads=4,
        kv_heads=2,
        ffn=24,
        vocab_size=vocab_size,
        max_positions=max_positions,
        init_std=std,
    )
    return build_model(config, RecycleConfig(layers=recycle_layers), seed=seed).eval()


def overfitted_model(tokens: list[int], vocab_size: int, depth: int = 3, steps: int = 110) -> RecycleGPT:
    """A model overfitted on one repeating text."""
    torch.manual_seed(0)
    config = ModelConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab_size=vocab_size, max_positions=128)
    model = build_model(config, RecycleConfig(layers=1, depth=depth, loss_weight=1.0), seed=1)
    length = 48
    starts = range(len(tokens))
    repeated = tokens * (2 + length // len(tokens) + 1)
    samples_BT = torch.tensor([repeated[start : start + length + 1] for start in starts])
    documents_BT = torch.zeros_like(samples_BT)
    targets = make_targets(samples_BT, documents_BT, depth)
    positions_BS = torch.arange(length).expand(len(samples_BT), -1)
    batch = Batch(samples_BT[:, :-1], positions_BS, documents_BT[:, :-1], targets.inputs, targets.targets)
    counts = (targets.targets >= 0).flatten(1).sum(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = model(batch, 1.0 / counts)
        loss.backward()
        optimizer.step()
    return model.eval()


class Letters:
    """A detokeniser of one letter per token."""

    def feed(self, token_id: int) -> str:
        """The token's letter."""
        return LETTERS[token_id]

    def flush(self) -> str:
        """Returns no text: no letter is held back."""
        return ""
