"""Runs plans with one copy to the device before a step and one back after it: the runner for GPUs. A step whose outcome is
not needed for it can be started before the one before it has ended.

The host describes a step in static buffers (fields.py), the device computes all of it in pieces (pieces.py and
draft_pieces.py), which `GraphPieces` replays as CUDA graphs, and the host reads what was chosen (outcome.py). What is accepted
decides which slots the module reads and where drafts go; here that is computed on the device, with padding where less is
accepted. Texts are those of `Runner`. Trees differ in one point: the device does not end them where chances are small, because
the host would have to know that before it launches the next depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from recycle_ds.inference.engine.cache import Cache, Tokens
from recycle_ds.inference.engine.device import fields
from recycle_ds.inference.engine.device.adjusting import Amended
from recycle_ds.inference.engine.device.buffers import Inbox, Outbox
from recycle_ds.inference.engine.device.capture import Pieces
from recycle_ds.inference.engine.device.draft_pieces import DraftPieces
from recycle_ds.inference.engine.device.filling import Filling
from recycle_ds.inference.engine.device.outcome import outcome_of, views
from recycle_ds.inference.engine.device.paged import PagedAttention
from recycle_ds.inference.engine.device.pieces import StepPieces
from recycle_ds.inference.engine.device.step_shape import StepShape
from recycle_ds.inference.engine.device.step_tools import StepTools
from recycle_ds.inference.engine.plan import PENDING, Outcome, Plan
from recycle_ds.inference.engine.runner import Runner
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.speculation.tree import BRANCH
from recycle_ds.inference.speculation.vocabulary import Vocabulary


class DeviceRunner(Runner):
    """`Runner` for a single process. The cache has one block more than plans use, the last one: for padding."""

    def __init__(
        self,
        weights: StageWeights,
        cache: Cache,
        vocabulary: Vocabulary,
        max_positions: int,
        attend: PagedAttention,
        launch: Pieces,
    ) -> None:
        """max_positions: of a sequence, with drafts. attend: over the cache. launch: how pieces are run."""
        super().__init__(weights, cache, vocabulary)
        size = cache.block_size
        self._scratch = len(cache.tokens) // size - 1
        self._launch = launch
        self._inbox = Inbox(fields.fields(-(-max_positions // size) + 1), weights.device)
        self._filling = Filling(self._inbox, size, self._scratch)
        vocabularies = (vocabulary, self._drafter.draft_vocabulary)
        places = fields.MOST_SEQUENCES
        self._amended = (Amended(places, vocabulary, weights.device), Amended(places, vocabularies[1], weights.device))
        tools = StepTools(weights, cache, vocabularies, self._amended, self._inbox.fields, attend, self._scratch)
        self._results, self._pieces, self._drafts = tools.results, StepPieces(tools), DraftPieces(tools)
        room = sum(one.numel() for one in vars(self._results).values() if one.dim() == 1)
        self._keys: dict[tuple[str, StepShape], StepShape] = {}
        """Of a piece and a step's shape: the shape without what the piece does not use, which is no part of its key."""
        # two: a step's results are read when the next one may have been started
        self._outboxes = deque(Outbox(room, weights.device) for _ in range(2))

    @property
    def first_runs(self) -> int | None:
        """See `Runner`."""
        return self._launch.first_runs

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Outcome | Callable[[], Outcome]:
        """See `Runner.launch`. At most two steps may be under way, of which the second reads what the first has chosen where a
        token is `PENDING`."""
        self._rules.update(plan.rules)
        for one in self._amended:
            one.forget(plan.ended)
        places = self._places(plan)
        if not plan.parts or places is None or not fields.fits(plan, self._rules):
            assert not any(PENDING in part.tokens for part in plan.parts), "a step like the one before fits, too"
            return super().launch(plan)
        self._begin(plan)
        self._inbox.wait()
        filled = self._filling.fill(plan, self._rules, places)
        shape = filled.shape
        self._inbox.send(shape.sequences)
        if plan.moves:
            self._pieces.move(len(plan.moves))
        self._cache.copy_blocks(plan.copies)
        if filled.flat:
            self._read_flat(plan, shape)
        else:
            self._run("read", self._pieces.read, shape)
        if filled.long_reads:
            self._drafter.read(filled.long_reads)
        if shape.choices:
            self._run("choose", self._pieces.choose, shape)
        if shape.reads:
            self._run("recycle", self._pieces.recycle, shape)
        if shape.chain:
            self._run("chain", self._drafts.chain, shape)
        if shape.depth:
            self._run("tree", self._drafts.tree, shape)
        return self._outcome(plan, shape) if shape.choices else ()

    def _run(self, name: str, piece: Callable[[StepShape], None], shape: StepShape) -> None:
        own = self._keys.get((name, shape))
        if own is None:
            own = self._keys[name, shape] = replace(
                shape, **{one: _NONE[one] for one in _NONE if one not in _USED[name]}
            )
        self._launch.run((name, own), lambda: piece(own))

    def _places(self, plan: Plan) -> list[int] | None:
        """Where each sequence's amendments are; None if there is no place left."""
        found = []
        for part in plan.parts:
            rules = self._rules[part.sequence]
            both = [one.place(part.sequence, rules) for one in self._amended]
            if both[0] is None:
                return None
            found.append(both[0])
        return found

    def _read_flat(self, plan: Plan, shape: StepShape) -> None:
        """The backbone reads tokens without padding, attending by sequence: where there are many of a prompt."""
        cache, device = self._cache, self._weights.device
        spans = [part.span() for part in plan.parts]
        slots_T = cache.slots(spans)
        ids_T = torch.tensor([token for part in plan.parts for token in part.tokens], device=device)
        cache.tokens[slots_T] = ids_T
        tokens = Tokens(cache.keys_values, spans, slots_T, cache.block_size)
        self._pieces.keep(self._weights.run(self._weights.embed(ids_T), tokens), slots_T, shape)

    def _outcome(self, plan: Plan, shape: StepShape) -> Callable[[], Outcome]:
        """Lets the device send what was chosen. The result waits for it: the only wait of a step."""
        count = {"accepted": shape.sequences, "token": shape.sequences}
        if shape.chain:
            count |= dict.fromkeys(("chain_ids", "chain_confidences"), shape.chain * shape.sequences)
        if shape.depth:
            nodes = shape.depth * shape.sequences * shape.beam
            count |= {"beams": nodes, "child_ids": nodes * BRANCH, "child_confidences": nodes * BRANCH}
        self._outboxes.rotate()
        outbox = self._outboxes[0]
        outbox.send([getattr(self._results, name)[:size] for name, size in count.items()])
        rules = {part.sequence: self._rules[part.sequence] for part in plan.parts}  # the next step may forget them

        def outcome() -> Outcome:
            numbers = dict(zip(count, outbox.receive(), strict=True))
            return outcome_of(plan.parts, rules, numbers["accepted"], numbers["token"], *views(shape, numbers))

        return outcome


_NONE: dict[str, Any] = {
    **dict.fromkeys(("rows", "choices", "reads", "chain", "depth", "beam"), 0),
    **dict.fromkeys(("sampled", "limited", "adjusted", "trees_judged"), False),
}
_CHOICE = ("sampled", "limited", "adjusted")
_USED = {
    "read": ("rows", "choices"),
    "choose": ("choices", "trees_judged", *_CHOICE),
    "recycle": ("reads",),
    "chain": ("chain", *_CHOICE),
    "tree": ("depth", "beam", *_CHOICE),
}
"""Sizes and variants that each piece uses, besides the sequences and the width."""
