"""The recycle module: reads what has become known, and makes drafts: chains, and trees of its likeliest tokens.

With the latest known token in slot i, the module's entry of a draft lies in a slot after i: that of draft k of a chain in
slot i + k, those of a tree's nodes in the order in which they get children. The true tokens overwrite them later. Shapes as
in cache.py; N sequences, V token ids, K children of a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from recycle_ds.inference.engine.cache import Cache, Tokens
from recycle_ds.inference.engine.plan import Chosen, Part, Rules
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.sampling import Position, adjust, choose
from recycle_ds.inference.speculation.tree import BRANCH, GrowingTree, confidences_of, renumbered, without_chain
from recycle_ds.inference.speculation.vocabulary import Vocabulary

_MOST_READ = 512
"""Slots that the module reads at once for one sequence."""


def position_of(
    cache: Cache, part: Part, rules: Rules, known: int, drafts: Sequence[int], stored: dict[int, Tensor]
) -> Position:
    """The position after the known tokens and some drafts. stored: the known tokens by sequence, which are kept here once a
    penalty has asked for them: all nodes of a tree have the same."""

    def history() -> Tensor:
        if part.sequence not in stored:
            stored[part.sequence] = cache.tokens[cache.slots([Span(part.blocks, 0, known)])]
        return torch.cat((stored[part.sequence], torch.tensor(drafts, dtype=torch.int64, device=cache.tokens.device)))

    at = known + len(drafts)
    return Position(rules.params, rules.seed, at, at - part.prompt_tokens, rules.end_ids, history)


def coupled(rules: Rules) -> bool:
    """Whether a draft of a chain is accepted if it is the token that the full model takes with the same random numbers."""
    return rules.params.greedy or rules.params.seed is not None


@dataclass
class _Chain:
    """The drafts of a sequence that drafts a chain after a step."""

    part: Part
    index: int
    """Position of the latest known token."""
    limit: int
    """Drafts to make."""
    ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)


@dataclass
class _Tree:
    """The drafts of a sequence that grows a tree after a step. index: position of the latest known token."""

    part: Part
    index: int
    nodes: GrowingTree


class Drafter:
    """Runs the recycle module. Of a sequence it keeps only the distributions that its latest drafts were drawn from."""

    def __init__(self, weights: StageWeights, cache: Cache, vocabulary: Vocabulary, rules: Mapping[int, Rules]) -> None:
        """rules: of the sequences, which the owner keeps up to date."""
        self._weights, self._cache, self._vocabulary, self._rules = weights, cache, vocabulary, rules
        self.draft_vocabulary = vocabulary
        if weights.draft_ids is not None:
            self.draft_vocabulary = replace(vocabulary, count=len(weights.draft_ids), selected=weights.draft_ids)
        self._drawn_from: dict[int, Tensor] = {}

    def take_distributions(self, sequence: int) -> Tensor | None:
        """The distributions that a sequence's latest drafts were drawn from [N, V]; None if they were not drawn at random."""
        return self._drawn_from.pop(sequence, None)

    def draft(self, parts: Sequence[Part], chosen: dict[int, Chosen]) -> dict[int, Chosen]:
        """Lets the module read what has become known, and draft. Returns the choice with the drafts."""
        reading: list[tuple[Part, range]] = []
        chains: list[_Chain] = []
        trees: list[_Tree] = []
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
                    trees.append(_Tree(part, index, GrowingTree(limit, part.width, part.floor / 1000, end_ids)))
                else:
                    chains.append(_Chain(part, index, limit))
                rows[part.width > 0].append(len(reading))
            reading.append((part, slots))
        if reading:
            states_ND = self.read(reading)
            if chains:
                self._chain(chains, _rows(states_ND, rows[0]))
            if trees:
                self._grow(trees, _rows(states_ND, rows[1]))
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
        before = [Span(span.blocks, span.first - 1, span.count) for span in spans]
        hidden_TD = self._cache.hidden[self._cache.slots(before)]
        slots_T = self._cache.slots(spans)
        states_TD = self._module(hidden_TD, self._cache.tokens[slots_T], spans, slots_T)
        return _rows(states_TD, [end - 1 for end in accumulate(span.count for span in spans)])

    def _grow(self, trees: Sequence[_Tree], states_ND: Tensor) -> None:
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
            states_ND = self._module(_rows(states_ND, sources), ids_T, spans, self._cache.slots(spans))

    @staticmethod
    def _beam(tree: _Tree) -> Span:
        """The nodes of the beam, in the cache of the module."""
        nodes = tree.nodes
        first, count = tree.index + 1 + len(nodes.expanded) - len(nodes.beam), len(nodes.beam)
        parents = nodes.slot_parents()
        return Span(tree.part.blocks, first, count, lowest=1, root=tree.index if parents else 0, parents=parents)

    def _children(
        self, trees: Sequence[_Tree], states_TD: Tensor, stored: dict[int, Tensor]
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
            vocabulary = self.draft_vocabulary
            positions = [
                position_of(self._cache, tree.part, rule, tree.index + 1, tree.nodes.path_ids(node), stored)
                for (tree, node), rule in zip(((t, node) for t in trees for node in t.nodes.beam), rules, strict=True)
            ]
            logits_TV = adjust(self._weights.draft_head(states_TD), positions, vocabulary)
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
    def _keys(trees: Sequence[_Tree], rules: Sequence[Rules], device: torch.device) -> Tensor | None:
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

    def _chain(self, chains: Sequence[_Chain], states_ND: Tensor) -> None:
        """Makes drafts 1, 2, ... of all sequences, one call of the module between two of them."""
        live, stored = list(chains), dict[int, Tensor]()
        while True:
            rules = [self._rules[one.part.sequence] for one in live]
            ids_N, confidence_N, probs_NV = self._choose(live, states_ND, rules, stored)
            for i, (one, token, value) in enumerate(zip(live, ids_N.tolist(), confidence_N.tolist(), strict=True)):
                one.ids.append(token)
                one.confidences.append(value)
                if probs_NV is not None and not coupled(rules[i]):
                    one.probs.append(self._spread(probs_NV[i], token))
            kept = [i for i, one in enumerate(live) if len(one.ids) < one.limit and one.ids[-1] not in rules[i].end_ids]
            if not kept:
                return
            if len(kept) < len(live):
                index_N = torch.tensor(kept, device=states_ND.device)
                states_ND, ids_N, live = states_ND[index_N], ids_N[index_N], [live[i] for i in kept]
            spans = [Span(one.part.blocks, one.index + len(one.ids), 1, lowest=1) for one in live]
            states_ND = self._module(states_ND, ids_N, spans, self._cache.slots(spans))

    def _choose(
        self, chains: Sequence[_Chain], states_ND: Tensor, rules: Sequence[Rules], stored: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The next draft of every chain [N], its confidence [N], and the distributions [N, V] if any is drawn at random.

        Drafts are chosen with the full model's random numbers, or with their own if they are verified by rejection. A
        confidence is that of the distribution, not of the token drawn: which drafts are verified must not depend on it."""
        vocabulary = self.draft_vocabulary
        assert self._weights.draft_head is not None and self._weights.module is not None, "only the last stage drafts"
        confidence_N = self._weights.module.confidence(states_ND)
        candidates = self._weights.candidates
        if candidates is not None and all(rule.params.greedy and not rule.params.adjusts for rule in rules):
            ids_N1, logprobs_N1 = candidates(states_ND, 1, None)
            return ids_N1[:, 0], logprobs_N1[:, 0].exp() if confidence_N is None else confidence_N, None
        positions = [
            position_of(self._cache, one.part, rule, one.index + 1, one.ids, stored)
            for one, rule in zip(chains, rules, strict=True)
        ]
        logits_NV = adjust(self._weights.draft_head(states_ND), positions, vocabulary)
        if confidence_N is None:
            highest_N = vocabulary.max(logits_NV.amax(-1))
            confidence_N = (highest_N - vocabulary.logsumexp(logits_NV)).exp().nan_to_num()
        ids_N, probs_NV = choose(logits_NV, positions, vocabulary)
        if not all(coupled(rule) for rule in rules):
            own_N, probs_NV = choose(logits_NV, positions, vocabulary, noise.DRAFT)
            ids_N = torch.where(torch.tensor([coupled(rule) for rule in rules], device=ids_N.device), ids_N, own_N)
        return ids_N, confidence_N, probs_NV

    def _spread(self, probs_V: Tensor, token: int) -> Tensor:
        """The distribution that a draft was drawn from, over this shard of the complete vocabulary.

        Where a request forbids all of the draft vocabulary, it is the token itself: it was not drawn at random.
        """
        full = self._vocabulary
        if self.draft_vocabulary is full:  # then a request that forbids all of it has been refused
            return probs_V
        ids = self.draft_vocabulary.ids(probs_V.device)
        probs_V = torch.where(probs_V.isnan(), (ids == token).float(), probs_V)
        return probs_V.new_zeros(full.count).index_copy_(0, ids - full.first, probs_V)

    def _module(self, hidden_TD: Tensor, ids_T: Tensor, spans: Sequence[Span], slots_T: Tensor) -> Tensor:
        assert self._weights.module is not None
        # entry (h_p, E x_{p+1}) lies in the slot of its token, p + 1, and has the rotary position p
        tokens = Tokens(self._cache.module_keys_values, spans, slots_T, self._cache.block_size, shift=-1)
        return self._weights.module(hidden_TD, self._weights.embed(ids_T), tokens)


def _rows(states_TD: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, or the tensor itself if they are all of its rows in their order."""
    if len(rows) == len(states_TD) and all(row == i for i, row in enumerate(rows)):
        return states_TD
    return states_TD[torch.tensor(rows, device=states_TD.device)]
