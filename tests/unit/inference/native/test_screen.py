"""The likeliest tokens that are found without reading the whole head, against those of all logits."""

from __future__ import annotations

import pytest
import torch

from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.heads import NativeHead
from recycle_ds.inference.native.packing import PackedProduct
from recycle_ds.inference.native.screen import LEAST_OUTPUTS, MOST_ROWS, ScreenedHead
from tests.unit.inference.native.kernels import bf16_model, needs_kernels

WIDTH, OUTPUTS = 64, 6000


def _states(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_kernels
@pytest.mark.parametrize("kind", ["random", "near ties", "equal", "outliers", "all alike"])
def test_the_likeliest_token_is_that_of_all_logits(kind: str) -> None:
    """Prevents a bound that is too narrow: a token that is the likeliest by the int8 copy, but not by the weights; the
    wrong one of equal logits; and a list of candidates that is too short."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUTPUTS, WIDTH, generator=generator)
    if kind == "near ties":  # all logits within what rounding to int8 changes
        weight = weight[:1] + 1e-3 * weight
    if kind == "equal":
        weight[1::2] = weight[::2]
        weight[-1] = weight[0]
    if kind == "outliers":
        weight[:, 3] *= 100
        weight[::7] *= 20
    if kind == "all alike":
        weight = weight[:1].expand(OUTPUTS, WIDTH)
    weight = weight.bfloat16().contiguous()
    ids = torch.arange(OUTPUTS) * 3 + 1
    barred = torch.tensor([0, 17, OUTPUTS - 1])
    product = PackedProduct(weight)
    head = NativeHead(product, ids, barred)
    screened = ScreenedHead(weight, head)
    states = _states(300)
    if kind == "outliers":
        states[::2, 3] *= 50
    logits = product(states)
    logits[:, barred] = -torch.inf
    expected = ids[logits.sort(dim=-1, descending=True, stable=True).indices[:, 0]].tolist()
    assert screened.likeliest(states) == expected == head.likeliest(states)
    assert [screened.likeliest(state[None])[0] for state in states[:40]] == expected[:40]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 3)
        assert screened.likeliest(states) == expected
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_states_that_are_no_numbers() -> None:
    """Prevents an endless search, or a token that was never compared, where a state has overflowed."""
    weight = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    head = NativeHead(PackedProduct(weight), None, None)
    screened = ScreenedHead(weight, head)
    for value in (float("nan"), float("inf"), 0.0):
        states = _states(3)
        states[1] = value
        assert screened.likeliest(states) == head.likeliest(states)


@needs_kernels
def test_large_heads_are_screened() -> None:
    """Prevents a head whose whole weight is read for every token, and one that gives other tokens with more rows."""
    with torch.inference_mode():
        weights = StageWeights(bf16_model(vocab_size=LEAST_OUTPUTS + 100, hidden=WIDTH))
        assert weights.head is not None and weights.head._screened is not None and weights.likeliest is not None
        states = _states(2 * MOST_ROWS)
        expected = weights.head(states).argmax(-1).tolist()
        assert weights.likeliest(states) == expected
        assert weights.likeliest(states[:MOST_ROWS]) + weights.likeliest(states[MOST_ROWS:]) == expected
