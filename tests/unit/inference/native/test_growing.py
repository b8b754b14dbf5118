"""Trees that the compiled kernels grow in one call, against those grown depth by depth."""

from __future__ import annotations

import pytest
import torch

from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.drafting.entries import run_module
from recycle_ds.inference.engine.drafting.trees import Tree, TreeGrower
from recycle_ds.inference.engine.plan import Part, Rules
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation.tree import GrowingTree
from recycle_ds.inference.speculation.vocabulary import Vocabulary
from tests.unit.inference.native.kernels import bf16_model, needs_kernels

BLOCKS = ((3, 1, 4), (0, 5, 2))
KNOWN = (18, 7)
"""Positions of the latest tokens of two texts."""


def grown(
    weights: StageWeights,
    vocabulary: int,
    params: TokenSampling,
    limit: int,
    width: int,
    floor: float,
    *,
    at_once: bool,
) -> tuple[list[GrowingTree], Cache]:
    """A tree after each of two texts that the module has read, and the cache that growing them wrote."""
    generator = torch.Generator().manual_seed(1)
    cache = Cache(weights, 6, 16)
    cache.module_keys_values.zero_()  # what was never written is compared, too
    spans = [Span(own, 1, last, lowest=1) for own, last in zip(BLOCKS, KNOWN, strict=True)]
    hidden = torch.randn(sum(KNOWN), weights.width, generator=generator).bfloat16()
    ids = torch.randint(0, 7, (sum(KNOWN),), generator=generator)
    states = run_module(weights, cache, hidden, ids, spans, cache.slots(spans))
    trees = [
        Tree(
            Part(
                number, last, (1,), 0, samples=True, module_start=0, drafts=limit, room=8, prompt_tokens=3, blocks=own
            ),
            last,
            GrowingTree(limit, width, floor, (2, 5)),
        )
        for number, (own, last) in enumerate(zip(BLOCKS, KNOWN, strict=True))
    ]
    ids = weights.draft_ids
    drafts = Vocabulary(0, vocabulary if ids is None else len(ids), selected=ids)
    grower = TreeGrower(weights, cache, drafts, {number: Rules(params, 5 + number, (2, 5)) for number in (0, 1)})
    (grower.grow if at_once else grower.grow_by_depth)(trees, states[[KNOWN[0] - 1, -1]])
    return [tree.nodes for tree in trees], cache


@needs_kernels
@pytest.mark.parametrize("params", [TokenSampling(), TokenSampling(0.8, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("vocabulary", "confidence", "limit", "width", "floor"),
    [
        (7, False, 5, 4, 0.0),
        (300, True, 8, 3, 0.0),
        (300, False, 4, 2, 0.4),
        (3, False, 6, 4, 0.0),
        (300, True, 1, 4, 0.0),
    ],
)
@torch.inference_mode()
def test_trees_in_one_call_are_those_grown_depth_by_depth(
    vocabulary: int, confidence: bool, limit: int, width: int, floor: float, params: TokenSampling
) -> None:
    """Prevents nodes with the state, the context or the chance of others, growth after an end token or beyond the limit, and
    entries in the wrong slots: drafts that are silently worse."""
    model = bf16_model(3, vocab_size=vocabulary, confidence=confidence)
    if vocabulary > 100:
        model.draft_ids = torch.arange(1, vocabulary, 3)
    weights = StageWeights(model)
    found, cache = grown(weights, vocabulary, params, limit, width, floor, at_once=True)
    expected, own_cache = grown(weights, vocabulary, params, limit, width, floor, at_once=False)
    assert any(tree.depth == limit for tree in expected) == (floor == 0.0)
    for tree, other in zip(found, expected, strict=True):
        assert (tree.depth, tree.ids, tree.parents) == (other.depth, other.ids, other.parents)
        # the confidence layer's sum is in fp32 here, in bf16 there
        assert tree.confidences == pytest.approx(other.confidences, rel=0.03, abs=1e-6)
        assert tree.chances == pytest.approx(other.chances, rel=0.1, abs=1e-6)
    assert torch.equal(cache.module_keys_values, own_cache.module_keys_values)
    assert cache.module_keys_values.count_nonzero() > 0
