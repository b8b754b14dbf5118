"""Attention kernels may return their output in any order of strides; that of a GPU's differs from the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.model import RecycleGPT, build_model
from tests.unit.inference.models import random_model


def _decoded(model: RecycleGPT) -> list[tuple[int, ...]]:
    engine = local_engine(model, max_batch=3)
    asked = [
        engine.add([first, 2, 3], SamplingParams(max_new_tokens=9, temperature=0), mode)[0]
        for first in (0, 1)
        for mode in ("autoregressive", "verified", "alternate")
    ]
    engine.finish(asked)
    return [tuple(one.tokens) for one in asked]


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0)], ids=str)
def test_decoding_accepts_every_order_of_strides(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents "view size is not compatible with input tensor's size and stride", which ended every fp32 decoding on a GPU."""
    model = random_model(8, 3, taps=(0,))
    plain = F.scaled_dot_product_attention
    expected = _decoded(model)
    called: list[bool] = []

    def of_a_gpu(*arguments: Tensor, **options: Any) -> Tensor:
        mixed = plain(*arguments, **options)
        back = [order.index(axis) for axis in range(4)]
        moved = mixed.permute(order).contiguous().permute(back)
        called.append(not moved.is_contiguous())
        return moved

    monkeypatch.setattr(F, "scaled_dot_product_attention", of_a_gpu)
    assert _decoded(model) == expected
    assert any(called), "no output had another order"


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 2, 1, 0)], ids=str)
def test_training_accepts_every_order_of_strides(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the same error of a forward pass over complete sequences, as training and evaluation run it."""
    config = ModelConfig(layers=1, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=11, max_positions=16)
    model = build_model(config, RecycleConfig(), seed=1)
    tokens = torch.arange(10).view(2, 5)
    expected = model.hidden_states(tokens)
    plain = F.scaled_dot_product_attention

    def of_a_gpu(*arguments: Tensor, **options: Any) -> Tensor:
        back = [order.index(axis) for axis in range(4)]
        return plain(*arguments, **options).permute(order).contiguous().permute(back)

    monkeypatch.setattr(F, "scaled_dot_product_attention", of_a_gpu)
    assert torch.equal(model.hidden_states(tokens), expected)
