"""Runs plans on tensors: the backbone over a step's tokens, choice and verification of tokens, new drafts.

One step of a sequence that drafts, with N known tokens of which the backbone has read all but the last, and D drafts:

    backbone  reads the last known token and the drafts, at positions N - 1 to N - 1 + D
    choice    the full model's token after each; the longest agreeing prefix of the drafts is accepted
    module    reads (h_{q-1}, E x_q) into the slots q that are now known; its last state gives the first draft
    chain     one call for each further draft, from (r, E draft); true tokens overwrite these slots later

Every tensor rank of a stage computes the same; only the last stage chooses tokens. Shapes as in cache.py; R rows with
logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from recycle_ds.inference.engine.cache import Cache, Tokens
from recycle_ds.inference.engine.plan import Chosen, Outcome, Part, Plan, Rules
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.generation import Logprobs
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.sampling import Position, adjust, choose
from recycle_ds.inference.speculation.verification import verify_equal, verify_sampled
from recycle_ds.inference.speculation.vocabulary import Vocabulary

_MOST_READ = 512
"""Slots that the module reads at once for one sequence."""
_MOST_SCORED = 64
"""Tokens of a prompt that are scored at once."""


@dataclass
class _Draft:
    """A sequence that drafts after a step."""

    part: Part
    index: int
    """Position of the latest known token."""
    limit: int
    """Drafts to make."""
    ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)


class Runner:
    """This rank's part of the model, and the cache. It keeps nothing of a sequence but its rules and its drafts'
    distributions."""

    def __init__(self, weights: StageWeights, cache: Cache, vocabulary: Vocabulary) -> None:
        self._weights, self._cache, self._vocabulary = weights, cache, vocabulary
        self._draft_vocabulary = vocabulary
        if weights.draft_ids is not None:
            self._draft_vocabulary = replace(vocabulary, count=len(weights.draft_ids), selected=weights.draft_ids)
        self._rules: dict[int, Rules] = {}
        self._draft_probs: dict[int, Tensor] = {}

    @torch.inference_mode()
    def run(self, plan: Plan, received_TD: Tensor | None = None) -> Outcome | Tensor:
        """Runs a step. received_TD: the states of the stage before; None on the first one.

        Returns the states [T, D] for the next stage, and on the last stage what was chosen.
        """
        self._rules |= plan.rules
        for number in plan.ended:
            self._rules.pop(number, None)
            self._draft_probs.pop(number, None)
        self._cache.copy_blocks(plan.copies)
        if not plan.parts:
            return ()
        cache, device = self._cache, self._weights.device
        spans = [Span(part.blocks, part.start, len(part.tokens)) for part in plan.parts]
        slots_T = cache.slots(spans)
        ids_T = torch.tensor([token for part in plan.parts for token in part.tokens], device=device)
        cache.tokens[slots_T] = ids_T
        x_TD = self._weights.embed(ids_T) if received_TD is None else received_TD
        states_TD = self._weights.run(x_TD, Tokens(cache.keys_values, spans, slots_T, cache.block_size))
        if self._weights.final_norm is None:
            return states_TD
        if self._weights.module is not None:
            cache.hidden[slots_T] = states_TD
            if states_TD.shape[1] > self._weights.width:
                states_TD = states_TD[:, : self._weights.width].contiguous()
        scored = self._score(plan.parts, states_TD)
        chosen = self._choose(plan.parts, states_TD)
        if self._weights.module is not None:
            chosen = self._draft(plan.parts, chosen)
        for number, scores in scored.items():
            chosen[number] = replace(chosen.get(number, Chosen(number, ())), scored=scores)
        return tuple(chosen.values())

    def _score(self, parts: Sequence[Part], states_TD: Tensor) -> dict[int, Logprobs]:
        """Log probabilities of the parts' targets, by sequence."""
        found: dict[int, Logprobs] = {}
        first = 0
        for part in parts:
            for start in range(0, len(part.targets), _MOST_SCORED):
                targets = part.targets[start : start + _MOST_SCORED]
                assert self._weights.head is not None, "only the last stage chooses tokens"
                raw_RV = self._weights.head(states_TD[first + start : first + start + len(targets)])
                scores = self._logprobs(raw_RV, targets, self._rules[part.sequence].params.logprobs)
                found[part.sequence] = found.get(part.sequence, ()) + scores
            first += len(part.tokens)
        return found

    def _choose(self, parts: Sequence[Part], states_TD: Tensor) -> dict[int, Chosen]:
        """Chooses the tokens of all sequences that sample and verifies their drafts. By sequence."""
        ends = accumulate(len(part.tokens) for part in parts)
        sampling = [(part, end) for part, end in zip(parts, ends, strict=True) if part.samples]
        if not sampling:
            return {}
        rows = [row for part, end in sampling for row in range(end - part.judged - 1, end)]
        every_row = len(rows) == len(states_TD)
        states_RD = states_TD if every_row else states_TD[torch.tensor(rows, device=states_TD.device)]
        assert self._weights.head is not None, "only the last stage chooses tokens"
        raw_RV = self._weights.head(states_RD)
        positions = [self._position(part, part.known + i) for part, _ in sampling for i in range(part.judged + 1)]
        logits_RV = adjust(raw_RV, positions, self._vocabulary)
        ids_R, probs_RV = choose(logits_RV, positions, self._vocabulary)
        ids = ids_R.tolist()  # the step's first synchronisation with the device
        found: dict[int, Chosen] = {}
        row = 0
        for part, _ in sampling:
            rules, width = self._rules[part.sequence], part.judged + 1
            drafts = part.tokens[len(part.tokens) - part.judged :]
            if self._is_coupled(rules) or not drafts:
                verified = verify_equal(drafts, ids[row : row + width])
            else:
                assert probs_RV is not None
                q_NV = self._draft_probs[part.sequence]
                at = (rules.seed, part.known, self._vocabulary)
                verified = verify_sampled(drafts, q_NV, probs_RV[row : row + width], *at)
            tokens = (*drafts[: verified.accepted], verified.token)
            logprobs = self._logprobs(raw_RV[row : row + len(tokens)], tokens, rules.params.logprobs)
            found[part.sequence] = Chosen(part.sequence, tokens, logprobs=logprobs)
            row += width
        return found

    @staticmethod
    def _is_coupled(rules: Rules) -> bool:
        """Whether a draft is accepted if it is the token that the full model takes with the same random numbers."""
        return rules.params.greedy or rules.params.seed is not None

    def _position(self, part: Part, index: int) -> Position:
        rules = self._rules[part.sequence]

        def history() -> Tensor:
            return self._cache.tokens[self._cache.slots([Span(part.blocks, 0, index)])]

        new_tokens = index - part.prompt_tokens
        return Position(rules.params, rules.seed, index, new_tokens, rules.end_ids, history)

    def _logprobs(self, raw_RV: Tensor, tokens: Sequence[int], count: int | None) -> Logprobs:
        """Log probabilities of the tokens, and of the `count` most likely ones, by the model's unchanged logits."""
        if count is None:
            return ()
        totals_R = self._vocabulary.logsumexp(raw_RV)
        own = (self._vocabulary.at(raw_RV, torch.tensor(tokens, device=raw_RV.device)) - totals_R).tolist()
        if count == 0:
            return tuple((value, ()) for value in own)
        best_RN, ids_RN = self._vocabulary.likeliest(raw_RV, count)
        best = (best_RN - totals_R[:, None]).tolist()
        pairs = [tuple(zip(row, values, strict=True)) for row, values in zip(ids_RN.tolist(), best, strict=True)]
        return tuple(zip(own, pairs, strict=True))

    def _draft(self, parts: Sequence[Part], chosen: dict[int, Chosen]) -> dict[int, Chosen]:
        """Lets the recycle module read what has become known, and draft. Returns the choice with the drafts."""
        reading: list[tuple[Part, range]] = []
        drafting: list[_Draft] = []
        readers: list[int] = []
        for part in parts:
            tokens = chosen[part.sequence].tokens if part.sequence in chosen else ()
            slots = part.module_slots(tokens, self._rules[part.sequence].end_ids)
            if not slots:
                continue
            if tokens:
                drafting.append(_Draft(part, slots.stop - 1, part.drafts_after(tokens)))
                readers.append(len(reading))
            reading.append((part, slots))
        self._store_tokens([(part, chosen[part.sequence]) for part in parts if part.sequence in chosen])
        if reading:
            states_ND = self._read(reading)
            if drafting:
                self._chain(drafting, states_ND if len(readers) == len(states_ND) else states_ND[readers])
        for draft in drafting:
            number = draft.part.sequence
            confidences = tuple(draft.confidences)
            chosen[number] = replace(chosen[number], drafts=tuple(draft.ids), confidences=confidences)
            if draft.probs:
                self._draft_probs[number] = torch.stack(draft.probs)
        return chosen

    def _store_tokens(self, kept: Sequence[tuple[Part, Chosen]]) -> None:
        """Writes the full model's tokens into their slots. Accepted drafts are there already."""
        if kept:
            ends = [Span(part.blocks, part.known + len(one.tokens) - 1, 1) for part, one in kept]
            tokens = torch.tensor([one.tokens[-1] for _, one in kept], device=self._weights.device)
            self._cache.tokens[self._cache.slots(ends)] = tokens

    def _read(self, reading: Sequence[tuple[Part, range]]) -> Tensor:
        """Runs the module over the missing slots of known tokens. Returns the last state of every sequence [N, D]."""
        spans = []
        for part, slots in reading:
            while len(slots) > _MOST_READ:  # after long without drafts: in pieces, or attention would need much memory
                self._read([(part, slots[:_MOST_READ])])
                slots = slots[_MOST_READ:]
            spans.append(Span(part.blocks, slots.start, len(slots), lowest=1))
        before = [Span(span.blocks, span.first - 1, span.count) for span in spans]
        hidden_TD = self._cache.hidden[self._cache.slots(before)]
        slots_T = self._cache.slots(spans)
        states_TD = self._module(hidden_TD, self._cache.tokens[slots_T], spans, slots_T)
        ends = [end - 1 for end in accumulate(span.count for span in spans)]
        return states_TD if len(ends) == len(states_TD) else states_TD[torch.tensor(ends, device=states_TD.device)]

    def _chain(self, drafting: Sequence[_Draft], states_ND: Tensor) -> None:
        """Makes drafts 1, 2, ... of all sequences, one call of the module between two of them."""
        live, vocabulary = list(drafting), self._draft_vocabulary
        assert self._weights.draft_head is not None and self._weights.module is not None, "only the last stage drafts"
        while True:
            at = [draft.index + len(draft.ids) + 1 for draft in live]
            positions = [self._position(draft.part, index) for draft, index in zip(live, at, strict=True)]
            logits_NV = adjust(self._weights.draft_head(states_ND), positions, vocabulary)
            coupled = all(self._is_coupled(self._rules[draft.part.sequence]) for draft in live)
            ids_N, probs_NV = self._choose_drafts(logits_NV, positions, live, coupled)
            # of the distribution, not of the token drawn: which drafts are verified must not depend on what was drawn
            confidence_N = self._weights.module.confidence(states_ND)
            if confidence_N is None:
                highest_N = vocabulary.max(logits_NV.amax(-1))
                confidence_N = (highest_N - vocabulary.logsumexp(logits_NV)).exp().nan_to_num()
            slots_N = self._cache.slots(
                [Span(draft.part.blocks, index, 1) for draft, index in zip(live, at, strict=True)]
            )
            self._cache.tokens[slots_N] = ids_N
            for i, (draft, token, value) in enumerate(zip(live, ids_N.tolist(), confidence_N.tolist(), strict=True)):
                draft.ids.append(token)
                draft.confidences.append(value)
                if probs_NV is not None and not self._is_coupled(self._rules[draft.part.sequence]):
                    draft.probs.append(self._spread(probs_NV[i], token))
            kept = [i for i, draft in enumerate(live) if self._drafts_on(draft)]
            if not kept:
                return
            if len(kept) < len(live):
                index_N = torch.tensor(kept, device=states_ND.device)
                states_ND, ids_N, slots_N = states_ND[index_N], ids_N[index_N], slots_N[index_N]
                live, at = [live[i] for i in kept], [at[i] for i in kept]
            spans = [Span(draft.part.blocks, index, 1, lowest=1) for draft, index in zip(live, at, strict=True)]
            states_ND = self._module(states_ND, ids_N, spans, slots_N)

    def _choose_drafts(
        self, logits_NV: Tensor, positions: Sequence[Position], live: Sequence[_Draft], coupled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts with the full model's random numbers, or with their own for sequences whose drafts are verified by
        rejection."""
        ids_N, probs_NV = choose(logits_NV, positions, self._draft_vocabulary)
        if coupled:
            return ids_N, probs_NV
        own_N, probs_NV = choose(logits_NV, positions, self._draft_vocabulary, noise.DRAFT)
        follows = [self._is_coupled(self._rules[draft.part.sequence]) for draft in live]
        return torch.where(torch.tensor(follows, device=ids_N.device), ids_N, own_N), probs_NV

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

    def _drafts_on(self, draft: _Draft) -> bool:
        """Whether a sequence drafts another token: not after a drafted end, which nothing can follow."""
        return len(draft.ids) < draft.limit and draft.ids[-1] not in self._rules[draft.part.sequence].end_ids

    def _module(self, hidden_TD: Tensor, ids_T: Tensor, spans: Sequence[Span], slots_T: Tensor) -> Tensor:
        assert self._weights.module is not None
        # entry (h_p, E x_{p+1}) lies in the slot of its token, p + 1, and has the rotary position p
        tokens = Tokens(self._cache.module_keys_values, spans, slots_T, self._cache.block_size, shift=-1)
        return self._weights.module(hidden_TD, self._weights.embed(ids_T), tokens)
