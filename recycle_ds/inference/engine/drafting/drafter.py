"""The recycle module in a step: it reads what has become known, and makes drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.drafting.chains import Chain, ChainDrafter
from recycle_ds.inference.engine.drafting.entries import read_cache, rows_of
from recycle_ds.inference.engine.drafting.trees import Tree, TreeGrower
from recycle_ds.inference.engine.plan import Chosen, Part, Rules
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.speculation.tree import GrowingTree, renumbered, without_chain
from recycle_ds.inference.speculation.vocabulary import Vocabulary

_MOST_READ = 512
"""Slots that the module reads at once for one sequence."""


class Drafter:
    """Runs the recycle module. Of a sequence it keeps only the distributions that its latest drafts were drawn from."""

    def __init__(self, weights: StageWeights, cache: Cache, vocabulary: Vocabulary, rules: Mapping[int, Rules]) -> None:
        """rules: of the sequences, which the owner keeps up to date."""
        self._weights, self._cache, self._rules = weights, cache, rules
        self.draft_vocabulary = vocabulary
        if weights.draft_ids is not None:
            self.draft_vocabulary = replace(vocabulary, count=len(weights.draft_ids), selected=weights.draft_ids)
        self._chains = ChainDrafter(weights, cache, vocabulary, self.draft_vocabulary, rules)
        self._trees = TreeGrower(weights, cache, self.draft_vocabulary, rules)
        self._drawn_from: dict[int, Tensor] = {}

    def take_distributions(self, sequence: int) -> Tensor | None:
        """The distributions that a sequence's latest drafts were drawn from [N, V]; None if they were not drawn at random."""
        return self._drawn_from.pop(sequence, None)

    def draft(self, parts: Sequence[Part], chosen: dict[int, Chosen]) -> dict[int, Chosen]:
        """Lets the module read what has become known, and draft. Returns the choice with the drafts."""
        reading: list[tuple[Part, range]] = []
        chains: list[Chain] = []
        trees: list[Tree] = []
        rows: tuple[list[int], list[int]] = ([], [])
        for part in parts:
            tokens = chosen[part.sequence].tokens if part.sequence in chosen else ()
            end_ids = self._rules[part.sequence].end_ids
            slots = part.module_slots(tokens, end_ids)
            if not slots:
                continue
            if tokens:
                index, limit = slots.stop - 1, part.drafts_after(tokens)
                if part.width:
                    trees.append(Tree(part, index, GrowingTree(limit, part.width, part.floor / 1000, end_ids)))
                else:
                    chains.append(Chain(part, index, limit))
                rows[part.width > 0].append(len(reading))
            reading.append((part, slots))
        if reading:
            states_ND = self.read(reading)
            if chains:
                self._chains.draft(chains, rows_of(states_ND, rows[0]))
            if trees:
                self._trees.grow(trees, rows_of(states_ND, rows[1]))
        for chain in chains:
            number, ids, confidences = chain.part.sequence, tuple(chain.ids), tuple(chain.confidences)
            chosen[number] = replace(chosen[number], drafts=ids, confidences=confidences, calls=len(ids))
            if chain.probs:
                self._drawn_from[number] = torch.stack(chain.probs)
        for tree in trees:
            number, nodes, best = tree.part.sequence, tree.nodes, tree.nodes.best()
            chosen[number] = replace(
                chosen[number],
                drafts=tuple(nodes.ids[node - 1] for node in best),
                confidences=tuple(nodes.confidences[node - 1] for node in best),
                parents=without_chain(renumbered(nodes.parents, best)),
                calls=nodes.depth,
            )
        return chosen

    def read(self, reading: Sequence[tuple[Part, range]]) -> Tensor:
        """Runs the module over the missing slots of known tokens. Returns the last state of every sequence [N, D]."""
        spans = []
        for part, slots in reading:
            while len(slots) > _MOST_READ:  # after long without drafts: in pieces, or attention would need much memory
                self.read([(part, slots[:_MOST_READ])])
                slots = slots[_MOST_READ:]
            spans.append(Span(part.blocks, slots.start, len(slots), lowest=1))
        states_TD = read_cache(self._weights, self._cache, spans)
        return rows_of(states_TD, [end - 1 for end in accumulate(span.count for span in spans)])
