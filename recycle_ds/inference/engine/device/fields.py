"""The fields in which the host tells the device what a step computes, and which plans fit into them. filling.py writes them.

S sequences, R rows, J nodes; `Tokens.slots` and the like in cache.py. Sequences are numbered in the order of the plan's parts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from recycle_ds.inference.engine.device.buffers import Field
from recycle_ds.inference.engine.device.step_shape import ROWS
from recycle_ds.inference.engine.plan import Plan, Rules
from recycle_ds.inference.speculation.tree import MAX_NODES

MOST_ROWS, MOST_SEQUENCES = ROWS[-1], 128
MOST_DEPTH = 16
"""Most drafts, one after the other, that are made."""
FEW_TOKENS = 64
"""Tokens of one sequence up to which they attend row by row."""
MOST_ENDS = 8
"""Tokens that end a text of which the device knows: what it drafts after others is dropped on the host."""

# names, by how many numbers each field has
OF_ROWS = ("ids", "positions", "slots", "sequences", "roots", "bits", "ends")
OF_CHOICES = ("sources", "choice_sequences", "choice_paths", "choice_depths")
OF_READS = ("read_sequences", "read_slots")
OF_NODES = ("draft_ids", "parent_rows", "paths")
OF_SEQUENCES = ("first_rows", "known", "samples", "drafts", "room", "widths", "last_reads", "prompt_tokens")
OF_REQUESTS = ("places", "top_k", "seeds", "nearly_greedy", "ends_from")
FLOATS_OF_REQUESTS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
"""Those of requests are the same in all steps of a sequence."""
_MOST_MOVES = MOST_SEQUENCES * MAX_NODES


def fields(table_width: int) -> dict[str, Field]:
    """All fields; the block tables come last."""
    whole = torch.int64
    found: dict[str, Field] = dict.fromkeys((*OF_ROWS, *OF_CHOICES, *OF_READS), ((MOST_ROWS,), whole))
    found |= dict.fromkeys((*OF_SEQUENCES, *OF_REQUESTS), ((MOST_SEQUENCES,), whole))
    found |= dict.fromkeys(FLOATS_OF_REQUESTS, ((MOST_SEQUENCES,), torch.float64))
    found |= dict.fromkeys(OF_NODES, ((MOST_SEQUENCES, MAX_NODES), whole))
    found |= {"end_ids": ((MOST_SEQUENCES, MOST_ENDS), whole)}
    found |= dict.fromkeys(("moves_from", "moves_to"), ((_MOST_MOVES,), whole))
    return found | {"tables": ((MOST_SEQUENCES, table_width), whole)}


def fits(plan: Plan, rules: Mapping[int, Rules]) -> bool:
    """Whether a plan's choices fit into the fields, and need nothing that they have not.

    Others are run by `Runner` itself: log probabilities, drafts that are verified by rejection, more than `MAX_NODES` drafts
    of a sequence to verify or `MOST_DEPTH` to make, more rows than there is room for."""
    rows = 0
    for part in plan.parts:
        params = rules[part.sequence].params
        if params.logprobs is not None or part.targets:
            return False
        drafting = part.judged > 0 or part.drafts > 0
        if drafting and not part.width and not params.greedy and params.seed is None:
            return False
        if part.judged > MAX_NODES or part.drafts > MOST_DEPTH or (part.width and part.drafts * part.width > 64):
            return False
        rows += part.samples * (part.judged + 1)
    return rows <= MOST_ROWS and len(plan.parts) <= MOST_SEQUENCES and len(plan.moves) <= _MOST_MOVES
