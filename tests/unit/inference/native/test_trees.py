"""Trees of drafts in the compiled kernels: a node's numbers are those of its token in a linear context, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.spans import Span, divided
from recycle_ds.inference.native.stack import NativeStack
from tests.unit.inference.native.kernels import bf16_model, needs_kernels

VOCABULARY = 40
SHAPES: list[dict[str, Any]] = [
    {},
    {"heads": 5, "head_dim": 16},
    {"heads": 2, "kv_heads": 2, "head_dim": 80},
    {"hidden": 64, "heads": 4, "kv_heads": 2, "qkv_bias": True},
]


@dataclass(frozen=True)
class Tree:
    """A sequence of known tokens and a tree of drafts after the last of them."""

    known: list[int]
    parents: list[int]
    drafts: list[int]
    blocks: tuple[int, ...]

    @property
    def root(self) -> int:
        """Slot of the latest known token."""
        return len(self.known) - 1

    def span(self, first: int, count: int, lowest: int = 0) -> Span:
        """Some slots of the sequence, with the parents up to the last."""
        nodes = max(first + count - 1 - self.root, 0)
        return Span(self.blocks, first, count, lowest, self.root, tuple(self.parents[:nodes]))

    def path(self, node: int) -> list[int]:
        """The drafts from the root to a node."""
        found = []
        while node:
            found.append(self.drafts[node - 1])
            node = self.parents[node - 1]
        return found[::-1]


class Rig:
    """A stack of blocks, the full model's or the module's, with a cache that nobody has written."""

    def __init__(self, shape: dict[str, Any], *, int8: bool, module: bool) -> None:
        model = bf16_model(3, int8=int8, vocab_size=VOCABULARY, **shape)
        weights = StageWeights(model)
        stack = weights._stack
        if module:
            assert weights.module is not None
            stack = weights.module.stack
        assert stack is not None
        self._stack: NativeStack = stack
        self._embedding, self._inputs = model.embedding.weight, 1 + module
        self.lowest, self._shift = int(module), -int(module)
        layers = weights.module_layers if module else weights.layers
        self._shape = layers, 40 * 16, 2 * weights.kv_heads, weights.channels
        self.clear()

    def clear(self) -> None:
        """Makes the cache one that nobody has written."""
        self.cache = torch.full(self._shape, torch.nan, dtype=torch.bfloat16)

    def run(self, spans: list[Span], ids: list[int]) -> Tensor:
        """The states of some tokens. A second input of the module is the reversed first one."""
        x = self._embedding[torch.tensor(ids)].detach()
        inputs = (x, x.flip(1))[: self._inputs]
        return self._stack(inputs, spans, self.cache, shift=self._shift)[0]

    def linear(self, ids: list[int], count: int) -> Tensor:
        """The states of the last tokens of a text on its own."""
        self.clear()
        blocks = tuple(range(len(ids) // 16 + 1))
        first = len(ids) - count
        if first > self.lowest:
            self.run([Span(blocks, self.lowest, first - self.lowest, self.lowest)], ids[self.lowest : first])
        return self.run([Span(blocks, first, count, self.lowest)], ids[first:])


def _tree(generator: random.Random, free: list[int], known: int, nodes: int) -> Tree:
    parents = [generator.choice([i, generator.randint(0, i)]) for i in range(nodes)]
    ids = [generator.randrange(VOCABULARY) for _ in range(known + nodes)]
    blocks = tuple(free.pop() for _ in range((known + nodes - 1) // 16 + 1))
    return Tree(ids[:known], parents, ids[known:], blocks)


def _expected(rig: Rig, tree: Tree) -> Tensor:
    """The states of the root and of all nodes, each in a text of its own."""
    texts = [tree.known, *(tree.known + tree.path(node) for node in range(1, len(tree.drafts) + 1))]
    return torch.cat([rig.linear(text, 1) for text in texts])


@needs_kernels
@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
@torch.inference_mode()
def test_nodes_are_tokens_of_linear_contexts(shape: int, int8: bool, module: bool) -> None:
    """Prevents a node that sees its siblings, misses an ancestor, has another position, or sums in another order than the
    same token without a tree; in calls with several trees, prompts and single tokens; and memory that was never written."""
    generator = random.Random(shape)
    rig = Rig(SHAPES[shape], int8=int8, module=module)
    low = rig.lowest
    free = list(range(40))
    generator.shuffle(free)
    trees = [
        _tree(generator, free, known, nodes) for known, nodes in ((14, 9), (1 + low, 20), (31, 7), (40, 1), (20, 40))
    ]
    prompt, single = _tree(generator, free, 23, 0), _tree(generator, free, 18, 0)
    expected = [_expected(rig, tree) for tree in trees]
    expected_prompt, expected_single = rig.linear(prompt.known, 20), rig.linear(single.known, 1)
    rig.clear()
    read = [tree for tree in (*trees, single) if tree.root > low]
    rig.run(
        [tree.span(low, tree.root - low, low) for tree in read],
        [one for tree in read for one in tree.known[low : tree.root]],
    )
    rig.run([Span(prompt.blocks, low, 3 - low, low)], prompt.known[low:3])
    spans = [tree.span(tree.root, 1 + len(tree.drafts), low) for tree in trees]
    ids = [one for tree in trees for one in (tree.known[-1], *tree.drafts)]
    spans[2:2] = [Span(prompt.blocks, 3, 20, low), Span(single.blocks, 17, 1, low)]
    before = sum(1 + len(tree.drafts) for tree in trees[:2])
    ids[before:before] = [*prompt.known[3:], single.known[-1]]
    whole = rig.run(spans, ids)
    parts = torch.cat([*expected[:2], expected_prompt, expected_single, *expected[2:]])
    assert torch.equal(whole, parts)
    # the same tokens again in pieces, which cut trees, and with the parents of later nodes
    found, first = [], 0
    for group in divided(spans, 11):
        count = sum(span.count for span in group)
        found.append(rig.run(group, ids[first : first + count]))
        first += count
    assert torch.equal(torch.cat(found), parts)


@needs_kernels
@torch.inference_mode()
def test_trees_grow_by_depth() -> None:
    """Prevents a node that sees something else when its ancestors were computed by earlier calls, as drafts are; and a wrong
    parent that changes nothing, with which the other tests would prove nothing."""
    generator = random.Random(5)
    rig = Rig({}, int8=False, module=True)
    free = list(range(40))
    # two children of each node, depth by depth
    parents = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    tree = replace(_tree(generator, free, 13, 12), parents=parents)
    expected = _expected(rig, tree)[1:]
    rig.clear()
    rig.run([tree.span(1, tree.root, 1)], tree.known[1:])
    found = []
    for first, count in ((0, 2), (2, 4), (6, 6)):
        span = tree.span(tree.root + 1 + first, count, 1)
        found.append(rig.run([span], tree.drafts[first : first + count]))
    assert torch.equal(torch.cat(found), expected)
    wrong = replace(tree, parents=[*parents[:6], 5, *parents[7:]])
    again = rig.run([wrong.span(tree.root + 7, 6, 1)], tree.drafts[6:])
    assert not torch.equal(again[0], expected[6]) and torch.equal(again[1:], expected[7:])
