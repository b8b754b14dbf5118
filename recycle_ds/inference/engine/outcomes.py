"""Takes in what a step chose for one sequence: its tokens, what became of its drafts, and new drafts."""

from __future__ import annotations

from collections.abc import Callable

from recycle_ds.inference.engine.block_tables import BlockTables
from recycle_ds.inference.engine.plan import Chosen, Part
from recycle_ds.inference.engine.sequence import Sequence
from recycle_ds.inference.speculation.acceptance import Verified
from recycle_ds.inference.speculation.budget import DraftBudget
from recycle_ds.inference.speculation.tree import depths, parents_of, path_of


def advance(
    sequence: Sequence,
    part: Part,
    mine: Chosen | None,
    tables: BlockTables,
    budget: DraftBudget,
    clock: Callable[[], float],
) -> None:
    """Records what a step did for one sequence. mine: what it chose; None for a chunk inside a prompt."""
    tokens = () if mine is None else mine.tokens
    sequence.full_calls += part.samples
    sequence.cached = part.known + max(len(tokens) - 1, 0)
    if part.module_start and (read := part.module_slots(tokens, sequence.rules.end_ids)):
        sequence.module_read = read.stop
        sequence.module_calls += 1 if mine is None else max(mine.calls, 1)
    if mine is not None and mine.scored:
        sequence.keep_scores(part.start, mine.scored)
    if tokens and mine is not None:
        if sequence.first_token_at is None:
            sequence.first_token_at = clock()
        path = path_of(part.judged_ids, part.parents, tokens[:-1]) if part.judged else []
        if path:
            # what is registered below is right for whoever reads it: a later step, which begins with these moves
            tables.move(part.moves(path, tables.pool.size))
        _keep(sequence, part, mine, path, budget)
    tables.register(sequence)


def _keep(sequence: Sequence, part: Part, mine: Chosen, path: list[int], budget: DraftBudget) -> None:
    """Appends the chosen tokens, and the recycled ones that `alternate` keeps. path: the accepted drafts."""
    kept = sequence.take(list(mine.tokens), [True] * len(path) + [False], part.judged)
    sequence.logprobs += mine.logprobs[:kept]
    if part.judged or sequence.ordered:
        _count(sequence, part, path, kept, budget)
    sequence.forget_drafts()
    # what `alternate` drafts is kept, never verified: it says nothing of acceptance
    makes_drafts = part.module_start > 0 and sequence.mode != "alternate"
    sequence.ordered = part.drafts_after(mine.tokens) if makes_drafts else 0
    if sequence.reason is not None:
        return
    if sequence.mode == "verified":
        sequence.keep_drafts(mine.drafts, mine.parents, mine.confidences, repeated=not budget.hopeless)
    elif mine.drafts:  # `alternate`
        sequence.tally.add(len(mine.drafts), 0, 0)
        sequence.take(list(mine.drafts), [True] * len(mine.drafts))


def _count(sequence: Sequence, part: Part, path: list[int], kept: int, budget: DraftBudget) -> None:
    """Records which drafts were accepted. A depth counts as tested if a draft was verified there."""
    parents = parents_of(part.judged, part.parents)
    depth = max(depths(parents), default=0)
    tested = len(path) + ((path[-1] if path else 0) in parents)
    ended = kept <= len(path)
    if ended:  # by an accepted draft
        tested, path = kept, path[:kept]
    if depth:
        sequence.tally.add(depth, tested, len(path))
    of_module = [node <= sequence.grown for node in sequence.judged]
    own = (at for at, is_own in zip(depths(parents), of_module, strict=True) if is_own)
    ordered = max(sequence.ordered, *own, 0)
    confidences = [sequence.confidences[node - 1] for node in sequence.judged]
    repeated = [node in sequence.repeated for node in sequence.judged]
    asked = min(len(path), ordered) if ended else ordered
    sampled = not sequence.params.greedy
    budget.observe(Verified(sequence.number, confidences, parents, path, asked, tested, sampled, of_module, repeated))
