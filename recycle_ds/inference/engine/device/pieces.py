"""The pieces of a step, in tensors: each reads and writes static buffers, waits for nothing, and can be captured.

    move      accepted nodes of trees of the step before get to their own positions
    read      the backbone reads the tokens
    choose    the full model's tokens, and which drafts are accepted
    recycle   the module reads what is known now
    chain     the module drafts chains
    tree      the module drafts trees

Shapes: T tokens, R rows with logits, N sequences, M slots that the module reads, J drafts of a sequence, V token ids, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recycle_ds.inference.engine.device import adjusting
from recycle_ds.inference.engine.device.judging import judge
from recycle_ds.inference.engine.device.paged import PagedTokens, Seen
from recycle_ds.inference.engine.device.step_shape import StepShape
from recycle_ds.inference.engine.device.step_tools import FULL, StepTools
from recycle_ds.inference.engine.plan import PENDING


class StepPieces:
    """The pieces up to what the module reads."""

    def __init__(self, tools: StepTools) -> None:
        self._tools = tools

    def move(self, count: int) -> None:
        """Moves keys and values of the backbone: the first `count` moves of the fields."""
        tools = self._tools
        read, write = tools.fields["moves_from"][:count], tools.fields["moves_to"][:count]
        tools.cache.keys_values[:, write] = tools.cache.keys_values[:, read]

    def read(self, shape: StepShape) -> None:
        """The backbone reads the tokens."""
        tools = self._tools
        at = {name: tools.fields[name][: shape.rows] for name in ("ids", "positions", "slots")}
        sequences, roots, bits, ends = (
            tools.fields[name][: shape.rows] for name in ("sequences", "roots", "bits", "ends")
        )
        seen = Seen(sequences, roots, bits, ends, tools.tables(shape), 0, tools.size)
        cache = tools.cache
        ids_T = torch.where(at["ids"] == PENDING, cache.tokens[at["slots"]], at["ids"])
        cache.tokens[at["slots"]] = ids_T
        tokens = PagedTokens(
            cache.keys_values,
            (),
            at["slots"],
            tools.size,
            positions_T=at["positions"],
            seen=seen,
            attend=tools.attend,
        )
        self.keep(tools.weights.run(tools.weights.embed(ids_T), tokens), at["slots"], shape)

    def keep(self, states_TD: Tensor, slots_T: Tensor, shape: StepShape) -> None:
        """Keeps the states that the module and the head need."""
        tools = self._tools
        if tools.weights.module is not None:
            tools.cache.hidden[slots_T] = states_TD
        if shape.choices:
            rows_R = tools.fields["sources"][: shape.choices]
            tools.results.chosen_states[: shape.choices] = states_TD[rows_R, : tools.weights.width]

    def choose(self, shape: StepShape) -> None:
        """The full model's token in every row, and what that makes of the drafts."""
        tools = self._tools
        assert tools.weights.head is not None, "only the last stage chooses tokens"
        at = {
            name: tools.fields[name][: shape.sequences] for name in ("first_rows", "known", "samples", "drafts", "room")
        }
        nodes = [tools.fields[name][: shape.sequences] for name in ("draft_ids", "parent_rows", "paths")]
        names = ("choice_sequences", "choice_paths", "choice_depths")
        sequences_R, paths_R, depths_R = (tools.fields[name][: shape.choices] for name in names)
        logits_RV = tools.weights.head(tools.results.chosen_states[: shape.choices])
        places_R = at["known"][sequences_R] + depths_R
        if shape.adjusted:
            used_RJ = (paths_R[:, None] >> torch.arange(nodes[0].shape[1], device=paths_R.device)) & 1 == 1
            drafts_RJ = torch.where(used_RJ, nodes[0][sequences_R], 0)
            counts = (
                tools.counts(shape, at["known"], FULL)
                .at(sequences_R)
                .plus(drafts_RJ, used_RJ, tools.vocabularies[FULL])
            )
            penalties = tools.penalties(shape, at["known"]).at(sequences_R)
            logits_RV = adjusting.adjust(logits_RV, adjusting.later(penalties, depths_R), counts, tools.amended[FULL])
        chosen_R = tools.chosen(shape, logits_RV, sequences_R, places_R, FULL)
        verdict = judge(chosen_R, at["first_rows"], *nodes)
        results, end = tools.results, shape.sequences
        samples_N = at["samples"] > 0
        results.accepted[:end] = (
            verdict.accepted_NJ.long() << torch.arange(verdict.accepted_NJ.shape[1], device=chosen_R.device)
        ).sum(-1)
        results.count[:end] = torch.where(samples_N, verdict.count_N, 0)
        results.token[:end] = verdict.token_N
        results.limits[:end] = torch.minimum(at["drafts"], at["room"] - verdict.count_N - 1).clamp_min(0)
        cache, root_N = tools.cache, at["known"] - 1
        if tools.weights.module is not None and shape.trees_judged:
            own_J = torch.arange(1, verdict.accepted_NJ.shape[1] + 1, device=chosen_R.device)
            depth_NJ = verdict.accepted_NJ.long().cumsum(-1)
            moved_NJ = verdict.accepted_NJ & samples_N[:, None] & (depth_NJ < own_J)
            read = tools.slots(shape, root_N[:, None] + own_J, moved_NJ).flatten()
            write = tools.slots(shape, root_N[:, None] + depth_NJ, moved_NJ).flatten()
            for tensor in (cache.tokens, cache.hidden):
                tensor[write] = tensor[read]
        last_N = at["known"] + results.count[:end]
        # for the module, and for the next step, which may have been planned already
        cache.tokens[tools.slots(shape, last_N[:, None], samples_N[:, None])[:, 0]] = verdict.token_N

    def recycle(self, shape: StepShape) -> None:
        """The module reads the slots of tokens that are known now; those that are not are padding."""
        tools = self._tools
        assert tools.weights.module is not None
        fields, results, end = tools.fields, tools.results, shape.sequences
        sequences_M, slots_M = (fields[name][: shape.reads] for name in ("read_sequences", "read_slots"))
        known_N, samples_N = fields["known"][:end], fields["samples"][:end] > 0
        # none where no drafts follow: as in `Part.module_slots`
        ends_N = torch.where(results.limits[:end] > 0, known_N + results.count[:end] + 1, 0)
        ends_N = torch.where(samples_N, ends_N, known_N)
        used_M = (slots_M > 0) & (slots_M < ends_N[sequences_M])
        before_M, own_M = (tools.slots_of(shape, sequences_M, at, used_M) for at in (slots_M - 1, slots_M))
        ids_M = torch.where(used_M, tools.cache.tokens[own_M], 0)
        seen = (sequences_M, slots_M, torch.zeros_like(slots_M), torch.where(used_M, slots_M + 1, 0))
        states_MD = tools.module(shape, tools.cache.hidden[before_M], ids_M, own_M, slots_M - 1, seen)
        last_N = (fields["last_reads"][:end] + ends_N - 1).clamp(0, shape.reads - 1)
        results.module_states[:end] = states_MD[last_N]
