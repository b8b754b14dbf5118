"""The likeliest tokens that are found without reading the whole head, against those of all logits."""

from __future__ import annotations

import pytest
import torch

from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.heads import NativeHead
from recycle_ds.inference.native.packing import PackedProduct
from recycle_ds.inference.native.screen import LEAST_OUTPUTS, MOST_SCREENED_ROWS, MOST_WIDTH, ScreenedHead
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
    screened = ScreenedHead.of(weight, head)
    assert screened is not None
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
    screened = ScreenedHead.of(weight, head)
    assert screened is not None
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
        states = _states(2 * MOST_SCREENED_ROWS)
        expected = weights.head(states).argmax(-1).tolist()
        assert weights.likeliest(states) == expected
        assert (
            weights.likeliest(states[:MOST_SCREENED_ROWS]) + weights.likeliest(states[MOST_SCREENED_ROWS:]) == expected
        )


@needs_kernels
def test_weights_that_are_no_numbers_and_too_wide_or_small_heads() -> None:
    """Prevents a bound that is no number, below which every token is lost, and a second copy that is never used."""
    weight = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    head = NativeHead(PackedProduct(weight), None, None)
    assert ScreenedHead.of(weight, head) is not None
    for value in (float("nan"), float("inf")):
        broken = weight.clone()
        broken[115, 3] = value
        assert ScreenedHead.of(broken, head) is None
    assert ScreenedHead.of(weight[: LEAST_OUTPUTS - 1], head) is None
    assert ScreenedHead.of(torch.ones(LEAST_OUTPUTS, MOST_WIDTH + 16).bfloat16(), head) is None


@needs_kernels
@pytest.mark.parametrize(("weights", "states"), [(1e20, 1e17), (1e20, 3e17), (1e35, 1e2), (1e-17, 1e-17), (1e-30, 1.0)])
def test_sums_that_overflow_or_underflow(weights: float, states: float) -> None:
    """Prevents a token lost because its logit overflowed in one of two sums, and bounds that are smaller than fp32 can tell."""
    weight = weights * torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(1))
    head = NativeHead(PackedProduct(weight.bfloat16()), None, None)
    screened = ScreenedHead.of(weight.bfloat16(), head)
    rows = (states * _states(64).float()).bfloat16()
    assert screened is None or screened.likeliest(rows) == head.likeliest(rows)
