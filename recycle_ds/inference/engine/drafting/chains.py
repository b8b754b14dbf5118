"""Chains of drafts: each one is chosen after the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.drafting.entries import position_of, run_module
from recycle_ds.inference.engine.plan import Part, Rules
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.adjusting import Adjuster
from recycle_ds.inference.speculation.sampling import choose
from recycle_ds.inference.speculation.vocabulary import Vocabulary


def coupled(rules: Rules) -> bool:
    """Whether a draft of a chain is accepted if it is the token that the full model takes with the same random numbers."""
    return rules.params.greedy or rules.params.seed is not None


@dataclass
class Chain:
    """The drafts of a sequence that drafts a chain after a step."""

    part: Part
    index: int
    """Position of the latest known token."""
    limit: int
    """Drafts to make."""
    ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)


class ChainDrafter:
    """Makes chains of drafts with the recycle module."""

    def __init__(
        self, weights: StageWeights, cache: Cache, full: Vocabulary, drafts: Vocabulary, rules: Mapping[int, Rules]
    ) -> None:
        """full, drafts: the model's vocabulary, and that of the drafts. rules: of the sequences; the owner keeps them up to
        date."""
        self._weights, self._cache, self._vocabulary, self._draft_vocabulary = weights, cache, full, drafts
        self._rules, self._adjuster = rules, Adjuster(drafts)

    def draft(self, chains: Sequence[Chain], states_ND: Tensor) -> None:
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
            states_ND = run_module(self._weights, self._cache, states_ND, ids_N, spans, self._cache.slots(spans))

    def _choose(
        self, chains: Sequence[Chain], states_ND: Tensor, rules: Sequence[Rules], stored: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The next draft of every chain [N], its confidence [N], and the distributions [N, V] if any is drawn at random.

        Drafts are chosen with the full model's random numbers, or with their own if they are verified by rejection. A
        confidence is that of the distribution, not of the token drawn: which drafts are verified must not depend on it."""
        vocabulary = self._draft_vocabulary
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
        logits_NV = self._adjuster.adjust(self._weights.draft_head(states_ND), positions)
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
        if self._draft_vocabulary is full:  # then a request that forbids all of it has been refused
            return probs_V
        ids = self._draft_vocabulary.ids(probs_V.device)
        probs_V = torch.where(probs_V.isnan(), (ids == token).float(), probs_V)
        return probs_V.new_zeros(full.count).index_copy_(0, ids - full.first, probs_V)
