"""Runs plans on tensors: the backbone over a step's tokens, choice and verification of tokens, new drafts.

One step of a sequence that drafts, with N known tokens of which the backbone has read all but the last, and D drafts:

    backbone  reads the last known token and the drafts: a chain at positions N - 1 to N - 1 + D, or a tree (see spans.py)
    choice    the full model's token after each; from the last known token on, the drafts that agree are accepted
    module    reads (h_{q-1}, E x_q) into the slots q that are now known; its last state gives the first drafts
    drafting  one call for each further depth, from (r, E draft); true tokens overwrite these slots later

Every tensor rank of a stage computes the same; only the last stage chooses tokens. Shapes as in cache.py; R rows with
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from recycle_ds.inference.engine.cache import Cache, Tokens
from recycle_ds.inference.engine.drafting.drafter import Drafter
from recycle_ds.inference.engine.drafting.entries import position_of
from recycle_ds.inference.engine.plan import Chosen, Outcome, Part, Plan, Rules
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.generation import Logprobs
from recycle_ds.inference.native.choice import sample
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.adjusting import Adjuster, Position
from recycle_ds.inference.speculation.sampling import choose, probabilities
from recycle_ds.inference.speculation.tree import ancestry, parents_of, walk
from recycle_ds.inference.speculation.verification import verify_sampled
from recycle_ds.inference.speculation.vocabulary import Vocabulary

_MOST_SCORED = 64
"""Tokens of a prompt that are scored at once."""


class Runner:
    """This rank's part of the model, and the cache. It keeps nothing of a sequence but its rules, and what `Drafter` keeps."""

    def __init__(self, weights: StageWeights, cache: Cache, vocabulary: Vocabulary) -> None:
        self._weights, self._cache, self._vocabulary = weights, cache, vocabulary
        self._compiled = weights.why_not_compiled is None and vocabulary.ranks is None
        self._rules: dict[int, Rules] = {}
        self._adjuster = Adjuster(vocabulary)
        self._drafter = Drafter(weights, cache, vocabulary, self._rules)

    @torch.inference_mode()
    def run(self, plan: Plan, received_TD: Tensor | None = None) -> Outcome | Tensor:
        """Runs a step. received_TD: the states of the stage before; None on the first one.

        Returns the states [T, D] for the next stage, and on the last stage what was chosen.
        """
        self._begin(plan)
        self._cache.move(plan.moves)
        self._cache.copy_blocks(plan.copies)
        if not plan.parts:
            return ()
        states_TD = self._run_backbone(plan.parts, received_TD)
        if self._weights.final_norm is None:
            return states_TD
        scored = self._score(plan.parts, states_TD) if any(part.targets for part in plan.parts) else {}
        chosen = self._choose(plan.parts, states_TD)
        if self._weights.module is not None:
            self._store_tokens([(part, chosen[part.sequence]) for part in plan.parts if part.sequence in chosen])
            chosen = self._drafter.draft(plan.parts, chosen)
        for number, scores in scored.items():
            chosen[number] = replace(chosen.get(number, Chosen(number, ())), scored=scores)
        return tuple(chosen.values())

    @property
    def first_runs(self) -> int | None:
        """How often something ran that took longer because its shape was new, such as a graph to be captured; None where shapes
        make no difference."""
        return None

    def launch(self, plan: Plan) -> Outcome | Callable[[], Outcome]:
        """Runs a step of a single process, or starts it: then the result waits for what was chosen."""
        outcome = self.run(plan)
        assert isinstance(outcome, tuple), "a single process has the last stage"
        return outcome

    def _run_backbone(self, parts: Sequence[Part], received_TD: Tensor | None) -> Tensor:
        """This stage's states of the parts' tokens. Keeps in the cache what the recycle module will read."""
        cache, weights = self._cache, self._weights
        spans, ids = [part.span() for part in parts], [token for part in parts for token in part.tokens]
        cache.write_tokens(spans, ids)
        if cache.contents is not None:
            assert min(ids) >= 0 and max(ids) < weights.embeddings, "the kernels do not check token ids"
            return weights.run_in_cache(cache.contents, spans, cache.keys_values)
        slots_T = cache.slots(spans)
        x_TD = weights.embed(torch.tensor(ids, device=weights.device)) if received_TD is None else received_TD
        states_TD = weights.run(x_TD, Tokens(cache.keys_values, spans, slots_T, cache.block_size))
        if weights.final_norm is not None and weights.module is not None:
            cache.hidden[slots_T] = states_TD
            if states_TD.shape[1] > weights.width:
                states_TD = states_TD[:, : weights.width].contiguous()
        return states_TD

    def _begin(self, plan: Plan) -> None:
        """Keeps the rules of new sequences, and forgets those that have ended."""
        self._rules.update(plan.rules)
        for number in plan.ended:
            self._rules.pop(number, None)
            self._drafter.take_distributions(number)

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
        drawn_from = [self._drafter.take_distributions(part.sequence) for part, _ in sampling]
        by_rejection = any(
            q_NV is not None and part.judged for q_NV, (part, _) in zip(drawn_from, sampling, strict=True)
        )
        ids, raw_RV, probs_RV = self._choose_rows([part for part, _ in sampling], states_RD, by_rejection)
        found: dict[int, Chosen] = {}
        moves: list[tuple[int, int]] = []
        row = 0
        for (part, _), q_NV in zip(sampling, drawn_from, strict=True):
            rules, drafts, width = self._rules[part.sequence], part.judged_ids, part.judged + 1
            if q_NV is None or not drafts:
                path = walk(drafts, part.parents, ids[row : row + width])
                token = ids[row + (path[-1] if path else 0)]
            else:
                assert probs_RV is not None
                at = (rules.seed, part.known, self._vocabulary)
                verified = verify_sampled(drafts, q_NV, probs_RV[row : row + width], *at)
                path, token = list(range(1, verified.accepted + 1)), verified.token
            tokens = (*(drafts[node - 1] for node in path), token)
            moves += part.moves(path, self._cache.block_size)
            logprobs: Logprobs = ()
            if rules.params.logprobs is not None:
                assert raw_RV is not None
                own = torch.tensor([row, *(row + node for node in path)], device=raw_RV.device)
                logprobs = self._logprobs(raw_RV[own], tokens, rules.params.logprobs)
            found[part.sequence] = Chosen(part.sequence, tokens, logprobs=logprobs)
            row += width
        self._cache.move_states(moves)
        return found

    def _choose_rows(
        self, parts: Sequence[Part], states_RD: Tensor, with_distributions: bool
    ) -> tuple[list[int], Tensor | None, Tensor | None]:
        """The full model's token after the latest known token of every part and after each of its drafts.

        Returns the ids, the logits unless none are needed, and if they are asked for, the distributions."""
        params = [self._rules[part.sequence].params for part in parts]
        likeliest = self._weights.likeliest  # compiled: without writing logits
        plain = all(one.greedy and not one.adjusts and one.logprobs is None for one in params)
        if likeliest is not None and plain:
            return likeliest(states_RD), None, None
        assert self._weights.head is not None, "only the last stage chooses tokens"
        raw_RV = self._weights.head(states_RD)
        positions, known = [], dict[int, Tensor]()
        for part in parts:
            rules, drafts = self._rules[part.sequence], part.judged_ids
            for path in ancestry(parents_of(part.judged, part.parents)):
                read = [drafts[node - 1] for node in path]
                positions.append(position_of(self._cache, part, rules, part.known, read, known))
        logits_RV = self._adjuster.adjust(raw_RV, positions)
        if self._compiled:  # for every row in every batch: a text must not depend on what is decoded beside it
            probs_RV = None
            if with_distributions:
                probs_RV = probabilities(logits_RV, [one.params for one in positions], self._vocabulary)
            return self._sample(logits_RV, positions), raw_RV, probs_RV
        ids_R, probs_RV = choose(logits_RV, positions, self._vocabulary)
        return ids_R.tolist(), raw_RV, probs_RV  # the step's first synchronisation with the device

    def _sample(self, logits_RV: Tensor, positions: Sequence[Position]) -> list[int]:
        """The same tokens as by `choose`, but for ties within rounding, in the compiled kernels."""
        sampled = [row for row, one in enumerate(positions) if not one.params.greedy]
        ids = [-1] * len(positions)
        if sampled:
            found = sample(
                logits_RV if len(sampled) == len(positions) else logits_RV[sampled],
                [positions[row].params for row in sampled],
                [noise.key(positions[row].seed, positions[row].index, noise.TOKEN) for row in sampled],
                self._vocabulary.first,
            )
            for row, token in zip(sampled, found, strict=True):
                ids[row] = token
        # greedy rows, and those whose logits overflow, by a penalty or a bias: nothing can be sampled from them
        rest = [row for row, token in enumerate(ids) if token < 0]
        if rest:
            for row, token in zip(rest, self._vocabulary.argmax(logits_RV[rest]).tolist(), strict=True):
                ids[row] = token
        return ids

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

    def _store_tokens(self, kept: Sequence[tuple[Part, Chosen]]) -> None:
        """Writes the full model's tokens into their slots. Accepted drafts are there already."""
        if kept:
            ends = [Span(part.blocks, part.known + len(one.tokens) - 1, 1) for part, one in kept]
            self._cache.write_tokens(ends, [one.tokens[-1] for _, one in kept])
