"""The module's entries: from states and tokens to states, and the positions that its drafts are chosen at.

With the latest known token in slot i, the module's entry of a draft lies in a slot after i: that of draft k of a chain in
slot i + k, those of a tree's nodes in the order in which they get children. The true tokens overwrite them later. Shapes as
in cache.py; N sequences, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recycle_ds.inference.engine.cache import Cache, Tokens
from recycle_ds.inference.engine.plan import Part, Rules
from recycle_ds.inference.engine.weights import ENTRY_SHIFT, StageWeights
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.speculation.adjusting import Position


def run_module(
    weights: StageWeights, cache: Cache, hidden_TD: Tensor, ids_T: Tensor, spans: Sequence[Span], slots_T: Tensor
) -> Tensor:
    """The module's states r [T, D] of entries made from h (or the r before) and the next tokens."""
    assert weights.module is not None
    tokens = Tokens(cache.module_keys_values, spans, slots_T, cache.block_size, shift=ENTRY_SHIFT)
    return weights.module(hidden_TD, weights.embed(ids_T), tokens)


def read_cache(weights: StageWeights, cache: Cache, spans: Sequence[Span]) -> Tensor:
    """The module's states r [T, D] of known tokens, from h of the slots before theirs."""
    assert weights.module is not None
    if cache.contents is not None:
        return weights.module.read_cache(cache.contents, spans, cache.module_keys_values)
    slots_T = cache.slots(spans)
    before = [Span(span.blocks, span.first - 1, span.count) for span in spans]
    return run_module(weights, cache, cache.hidden[cache.slots(before)], cache.tokens[slots_T], spans, slots_T)


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


def rows_of(states_TD: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, or the tensor itself if they are all of its rows in their order."""
    if len(rows) == len(states_TD) and all(row == i for i, row in enumerate(rows)):
        return states_TD
    if len(rows) == 1:
        return states_TD[rows[0] : rows[0] + 1]
    return states_TD[torch.tensor(rows, device=states_TD.device)]
