"""What a step chose, as the scheduler wants it, from the numbers that come back from the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from recycle_ds.inference.engine.device.step_shape import StepShape
from recycle_ds.inference.engine.plan import Chosen, Part, Rules
from recycle_ds.inference.speculation.tree import BRANCH, GrowingTree, renumbered, without_chain

Numbers = NDArray[np.int64] | NDArray[np.float64]


@dataclass(frozen=True)
class Chains:
    """Drafts of chains and their confidences [depth, N]."""

    ids: Numbers
    confidences: Numbers


@dataclass(frozen=True)
class Trees:
    """By depth [depth, N, B (, K)]: children of the beam's nodes, confidences (0 for none), and the next beam."""

    ids: Numbers
    confidences: Numbers
    beams: Numbers


def outcome_of(
    parts: Sequence[Part],
    rules: Mapping[int, Rules],
    accepted: Numbers,
    tokens: Numbers,
    chains: Chains | None,
    trees: Trees | None,
) -> tuple[Chosen, ...]:
    """What was chosen for all sequences that sample. accepted: nodes as bits [N]. tokens: those after them [N]."""
    found = []
    # both have the numbers of padding behind those of the parts
    for number, (part, bits, token) in enumerate(zip(parts, accepted.tolist(), tokens.tolist(), strict=False)):
        if not part.samples:
            continue
        if not part.judged and not part.drafts:
            found.append(Chosen(part.sequence, (token,)))
            continue
        drafts, end_ids = part.judged_ids, rules[part.sequence].end_ids
        path = [drafts[node] for node in range(len(drafts)) if bits >> node & 1]
        chosen = Chosen(part.sequence, (*path, token))
        limit = part.drafts_after(chosen.tokens) if part.module_slots(chosen.tokens, end_ids) else 0
        if limit and part.width:
            assert trees is not None
            chosen = _with_tree(chosen, number, part, limit, end_ids, trees)
        elif limit:
            assert chains is not None
            chosen = _with_chain(chosen, number, limit, end_ids, chains)
        found.append(chosen)
    return tuple(found)


def _with_chain(chosen: Chosen, number: int, limit: int, end_ids: Collection[int], chains: Chains) -> Chosen:
    ids = [int(one) for one in chains.ids[:limit, number]]
    ended = next((at for at, one in enumerate(ids, start=1) if one in end_ids), limit)  # nothing follows an end
    values = tuple(float(one) for one in chains.confidences[:ended, number])
    return replace(chosen, drafts=tuple(ids[:ended]), confidences=values, calls=ended)


def _with_tree(chosen: Chosen, number: int, part: Part, limit: int, end_ids: Collection[int], trees: Trees) -> Chosen:
    tree = GrowingTree(limit, part.width, end_ids=end_ids)
    beam: list[int | None] = [0]  # node in each place of the beam
    for depth in range(limit):
        numbers: dict[int, int] = {}
        for place, node in enumerate(beam):
            if node is None:
                continue
            row = list(zip(trees.ids[depth, number, place], trees.confidences[depth, number, place], strict=True))
            first = len(tree.ids) + 1
            kept = [at for at, (_, confidence) in enumerate(row) if confidence > 0]
            tree.add(node, [(int(row[at][0]), float(row[at][1])) for at in kept])
            numbers |= {place * BRANCH + at: first + nth for nth, at in enumerate(kept)}
        tree.depth += 1
        picked = trees.beams[depth, number].tolist() if depth + 1 < limit else []
        nodes = [numbers.get(one) for one in picked]
        beam = [None if node is None or tree.ids[node - 1] in end_ids else node for node in nodes]
    best = tree.best()
    return replace(
        chosen,
        drafts=tuple(tree.ids[node - 1] for node in best),
        confidences=tuple(tree.confidences[node - 1] for node in best),
        parents=without_chain(renumbered(tree.parents, best)),
        calls=tree.depth,
    )


def views(shape: StepShape, results: Mapping[str, Numbers]) -> tuple[Chains | None, Trees | None]:
    """What the drafting pieces wrote, with its shape."""
    chains = trees = None
    if shape.chain:
        size = (shape.chain, shape.sequences)
        chains = Chains(results["chain_ids"].reshape(size), results["chain_confidences"].reshape(size))
    if shape.depth:
        beams = (shape.depth, shape.sequences, shape.beam)
        ids, confidences = (results[name].reshape(*beams, BRANCH) for name in ("child_ids", "child_confidences"))
        trees = Trees(ids, confidences, results["beams"].reshape(beams))
    return chains, trees
