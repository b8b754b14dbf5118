"""Tokens chosen in the compiled kernels against the logits of the same head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.heads import NativeHead
from recycle_ds.inference.native.joining import NativeJoin
from recycle_ds.inference.native.packing import PackedProduct
from recycle_ds.inference.native.torch_products import Product, TorchJoin
from tests.unit.inference.native.kernels import bf16_model, needs_kernels

WIDTH, ROWS = 48, 29


def _states(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=generator).bfloat16()


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("outputs", [1, 7, 16, 128, 129, 700])
def test_tokens_are_those_of_the_logits(outputs: int, with_ids: bool, int8: bool) -> None:
    """Prevents a token that the logits would not give: at the end of the head, among equal logits, barred, or because of
    the rows or threads of the call; and log probabilities at another temperature or over barred tokens."""
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, WIDTH, generator=generator).bfloat16()
    weight[outputs // 2 :: 3] = weight[outputs // 3].clone()  # equal logits, in one chunk and in several
    ids = torch.arange(outputs) * 5 + 2 if with_ids else torch.arange(outputs)
    barred = torch.tensor([0, outputs // 3, outputs - 1]).unique() if outputs > 3 else None
    product = PackedProduct(weight, int8=int8)
    head = NativeHead(product, ids if with_ids else None, barred)
    states = _states(generator)
    factors = torch.rand(ROWS, generator=generator) * 2 + 0.1
    logits = product(states)
    allowed = torch.ones(outputs, dtype=torch.bool)
    if barred is not None:
        logits[:, barred], allowed[barred] = -torch.inf, False
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert head.likeliest(states) == ids[order[:, 0]].tolist()
    for factor, count in ((None, 1), (None, 4), (factors, 16)):
        found, log_probabilities = head.candidates(states, count, factor)
        kept = min(count, int(allowed.sum()))
        assert torch.equal(found, ids[order[:, :kept]]) and found.dtype == torch.int64
        expected = (logits if factor is None else logits * factor[:, None]).double().log_softmax(-1)
        torch.testing.assert_close(log_probabilities.double(), expected.gather(-1, order[:, :kept]), rtol=0, atol=2e-5)
        for rows in (1, 2, 5, 13):
            part = head.candidates(states[:rows], count, None if factor is None else factor[:rows])
            assert torch.equal(part[0], found[:rows]) and torch.equal(part[1], log_probabilities[:rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert head.likeliest(states) == ids[order[:, 0]].tolist()
        again = head.candidates(states, 16, factors)
        assert torch.equal(again[0], found) and torch.equal(again[1], log_probabilities)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_heads_of_a_model() -> None:
    """Prevents a choice from the wrong head, an id without a token, and a second copy of the complete head's weight."""
    model = bf16_model(vocab_size=45, tied_embeddings=False, vocab_multiple=16)
    model.unnamed_ids = (3, 44)
    drafts = copy.deepcopy(model)
    drafts.draft_ids = torch.tensor([2, 3, 9, 30, 31])
    states = torch.randn(9, model.config.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        weights = StageWeights(drafts)
        assert weights.head is not None and weights.draft_head is not None and weights.draft_ids is not None
        assert weights.likeliest is not None and weights.candidates is not None
        assert weights.likeliest(states) == weights.head(states).argmax(-1).tolist()
        logits = weights.draft_head(states)
        best = logits.topk(4)
        ids, log_probabilities = weights.candidates(states, 16, None)
        assert torch.equal(ids, weights.draft_ids[best.indices]) and not (ids == 3).any()
        torch.testing.assert_close(log_probabilities, logits.log_softmax(-1).gather(-1, best.indices))
        full = StageWeights(model)
        assert full.draft_head is full.head and full.head is not None and full.candidates is not None
        assert torch.equal(full.candidates(states, 1, None)[0][:, 0], full.head(states).argmax(-1))
        plain = StageWeights(model, compiled=False)
        assert plain.likeliest is None and plain.candidates is None


@needs_kernels
def test_drafts_use_int8_weights_in_bf16() -> None:
    """Prevents a module or a draft head with 16-bit weights, which take twice as long to read, and a full model with 8-bit
    ones, whose text would be another one."""
    model = bf16_model(vocab_size=45, hidden=64, taps=(0,))
    model.draft_ids = torch.tensor([2, 3, 9])
    weights = StageWeights(model)
    assert weights.head is not None and weights.draft_head is not None
    assert weights.module is not None and weights.module.stack is not None and weights._stack is not None
    assert isinstance(weights.module.join_taps, NativeJoin)
    products = [product for kept in weights.module.stack._kept if isinstance(kept, tuple) for product in kept]
    products += [kept for kept in weights.module.stack._kept if isinstance(kept, PackedProduct)]
    products += [weights.module.join_taps._product, weights.draft_head._product]
    assert len(products) == 7 and all(product.weight.dtype == torch.int8 for product in products)
    full = [product for kept in weights._stack._kept if isinstance(kept, tuple) for product in kept]
    full.append(weights.head._product)
    assert len(full) == 9 and all(product.weight.dtype == torch.bfloat16 for product in full)


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
def test_joined_states_are_those_of_norms_and_product(int8: bool) -> None:
    """Prevents a tapped state that goes through another one's norm or columns, which only makes drafts worse."""
    model = bf16_model(hidden=64, taps=(0, 1), init_std=0.3)
    assert model.recycle is not None and model.recycle.tap_projection is not None
    generator = torch.Generator().manual_seed(2)
    norms, weight = list(model.recycle.tap_norms), model.recycle.tap_projection.weight
    for tensor in (weight, *(norm.weight for norm in norms)):
        torch.nn.init.normal_(tensor, std=0.5, generator=generator)
    for rows in (1, 5, 30):
        states = [torch.randn(rows, 64, generator=generator).bfloat16() for _ in norms]
        found = NativeJoin(norms, weight, int8=int8)(states)
        expected = TorchJoin(norms, Product(weight, int8=int8))(states)
        assert found.shape == (rows, len(weight)) and found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.06)
        alone = NativeJoin(norms, weight, int8=int8)([one[:1] for one in states])
        assert torch.equal(found[:1], alone)
