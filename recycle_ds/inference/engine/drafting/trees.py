"""Trees of drafts: the module's likeliest tokens, depth by depth. Shapes: K children of a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.drafting.entries import position_of, rows_of, run_module
from recycle_ds.inference.engine.plan import Part, Rules
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.growing import Root
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.adjusting import Adjuster
from recycle_ds.inference.speculation.tree import BRANCH, GrowingTree, confidences_of
from recycle_ds.inference.speculation.vocabulary import Vocabulary


@dataclass
class Tree:
    """The drafts of a sequence that grows a tree after a step. index: position of the latest known token."""

    part: Part
    index: int
    nodes: GrowingTree


class TreeGrower:
    """Grows trees with the recycle module."""

    def __init__(self, weights: StageWeights, cache: Cache, drafts: Vocabulary, rules: Mapping[int, Rules]) -> None:
        """drafts: the vocabulary of the drafts. rules: of the sequences; the owner keeps them up to date."""
        self._weights, self._cache, self._draft_vocabulary, self._rules = weights, cache, drafts, rules
        self._adjuster = Adjuster(drafts)

    def grow(self, trees: Sequence[Tree], states_ND: Tensor) -> None:
        """Grows the trees of all sequences. states_ND: of the latest known tokens."""
        rules = [self._rules[tree.part.sequence] for tree in trees]
        grower = self._weights.grower
        if grower is None or any(one.params.adjusts for one in rules):
            self.grow_by_depth(trees, states_ND)
            return
        roots = [self._root(tree, one) for tree, one in zip(trees, rules, strict=True)]
        for tree, grown in zip(trees, grower.grow(states_ND, roots, self._cache.module_keys_values), strict=True):
            nodes = tree.nodes
            nodes.ids, nodes.parents, nodes.depth = grown.ids, grown.parents, grown.depth
            nodes.confidences, nodes.chances, nodes.beam = grown.confidences, grown.chances, []

    @staticmethod
    def _root(tree: Tree, rules: Rules) -> Root:
        """Where a tree is grown from by the compiled kernels."""
        params, nodes = rules.params, tree.nodes
        # limits are not applied to drafts; where they leave few tokens, the likeliest ones are better guesses than others
        keys = (
            ()
            if params.nearly_greedy
            else [noise.key(rules.seed, tree.index + 1 + depth, noise.TOKEN) for depth in range(nodes.limit)]
        )
        factor = 1.0 if params.greedy else 1 / params.temperature
        return Root(
            tree.part.blocks,
            tree.index,
            nodes.limit,
            nodes.width,
            nodes.floor,
            rules.end_ids,
            factor,
            keys,
            params.greedy,
        )

    def grow_by_depth(self, trees: Sequence[Tree], states_ND: Tensor) -> None:
        """Grows the trees of all sequences, one call of the module between two depths. states_ND: of the latest tokens."""
        live, stored = list(trees), dict[int, Tensor]()
        while True:
            children = self._children(live, states_ND, stored)
            first, kept = 0, []
            sources: list[int] = []  # the state from which each node of the next beams comes
            for tree in live:
                beam, tree_first = tree.nodes.beam, first
                first += len(beam)
                tree.nodes.grow(children[tree_first:first])
                if tree.nodes.beam:
                    kept.append(tree)
                    row_of = {node: tree_first + row for row, node in enumerate(beam)}
                    sources += [row_of[tree.nodes.parents[node - 1]] for node in tree.nodes.beam]
            live = kept
            if not live:
                return
            ids = [tree.nodes.ids[node - 1] for tree in live for node in tree.nodes.beam]
            spans = [self._beam(tree) for tree in live]
            ids_T = torch.tensor(ids, device=states_ND.device)
            states_ND = run_module(
                self._weights, self._cache, rows_of(states_ND, sources), ids_T, spans, self._cache.slots(spans)
            )

    @staticmethod
    def _beam(tree: Tree) -> Span:
        """The nodes of the beam, in the cache of the module."""
        nodes = tree.nodes
        first, count = tree.index + 1 + len(nodes.expanded) - len(nodes.beam), len(nodes.beam)
        parents = nodes.slot_parents()
        return Span(tree.part.blocks, first, count, lowest=1, root=tree.index if parents else 0, parents=parents)

    def _children(
        self, trees: Sequence[Tree], states_TD: Tensor, stored: dict[int, Tensor]
    ) -> list[list[tuple[int, float]]]:
        """The likeliest tokens after every node of the beams, and their confidences, descending.

        Where the full model samples, likely are the tokens that the module takes with the same random numbers: confidences
        are then those of a softmax over what sampling takes the maximum of."""
        assert self._weights.draft_head is not None and self._weights.module is not None
        rules = [self._rules[tree.part.sequence] for tree in trees for _ in tree.nodes.beam]
        scales = [1.0 if one.params.greedy else 1 / one.params.temperature for one in rules]
        scale_T = None if set(scales) == {1.0} else torch.tensor(scales, device=states_TD.device)
        keys_T = self._keys(trees, rules, states_TD.device)
        candidates = self._weights.candidates  # compiled: without writing logits
        if candidates is not None and not any(one.params.adjusts for one in rules):
            ids_TK, logprobs_TK = candidates(states_TD, BRANCH, scale_T, keys_T)
        else:
            vocabulary = self._draft_vocabulary
            positions = [
                position_of(self._cache, tree.part, rule, tree.index + 1, tree.nodes.path_ids(node), stored)
                for (tree, node), rule in zip(((t, node) for t in trees for node in t.nodes.beam), rules, strict=True)
            ]
            logits_TV = self._adjuster.adjust(self._weights.draft_head(states_TD), positions)
            if scale_T is not None:
                logits_TV = logits_TV * scale_T[:, None]
            if keys_T is not None:
                clocks_TV = noise.exponentials(keys_T, vocabulary.ids(keys_T.device))
                logits_TV = torch.where(keys_T[:, None] == 0, logits_TV, logits_TV - clocks_TV.log())
            values_TK, ids_TK = vocabulary.likeliest(logits_TV, BRANCH)
            logprobs_TK = values_TK - vocabulary.logsumexp(logits_TV)[:, None]
        layer_T = self._weights.module.confidence(states_TD)
        values = [None] * len(ids_TK) if layer_T is None else layer_T.tolist()
        layers = [value if one.params.greedy else None for value, one in zip(values, rules, strict=True)]
        found = []
        for ids, logprobs, layer in zip(ids_TK.tolist(), logprobs_TK.exp().tolist(), layers, strict=True):
            # 0 and NaN: tokens that a request forbids, or of a vocabulary with fewer tokens
            row = [(token, probability) for token, probability in zip(ids, logprobs, strict=True) if probability > 0]
            confidences = confidences_of([probability for _, probability in row], layer) if row else []
            found.append([(token, value) for (token, _), value in zip(row, confidences, strict=True)])
        return found

    @staticmethod
    def _keys(trees: Sequence[Tree], rules: Sequence[Rules], device: torch.device) -> Tensor | None:
        """Keys of the random numbers with which the token after each node of the beams is sampled, 0 without; None if all
        are without."""
        if all(one.params.nearly_greedy for one in rules):
            return None
        places = [tree.index + 1 + tree.nodes.depth for tree in trees for _ in tree.nodes.beam]
        # limits are not applied to drafts; where they leave few tokens, the likeliest ones are better guesses than others
        keys = [
            0 if one.params.nearly_greedy else noise.key(one.seed, place, noise.TOKEN)
            for one, place in zip(rules, places, strict=True)
        ]
        return torch.tensor(keys, device=device)
