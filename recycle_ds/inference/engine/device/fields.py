"""The fields in which the host tells the device what a step computes, and how they are filled from a plan.

S sequences, R rows, J nodes; `Tokens.slots` and the like in cache.py. Sequences are numbered in the order of the plan's parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from recycle_ds.inference.engine.device.buckets import ROWS, rows_bucket, width_bucket
from recycle_ds.inference.engine.device.buffers import Field, Inbox
from recycle_ds.inference.engine.device.step_shape import StepShape
from recycle_ds.inference.engine.plan import Part, Plan, Rules
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.tree import MAX_NODES, ancestry, parents_of

MOST_ROWS, MOST_SEQUENCES = ROWS[-1], 128
MOST_DEPTH = 16
"""Most drafts, one after the other, that are made."""
_FEW_READ = 16
"""Slots of one sequence up to which the module reads them with those of others."""
FEW_TOKENS = 64
"""Tokens of one sequence up to which they attend row by row."""
_MOST_ENDS = 8
"""Tokens that end a text of which the device knows: what it drafts after others is dropped on the host."""

_OF_ROWS = ("ids", "positions", "slots", "sequences", "roots", "bits", "ends")
_OF_CHOICES = ("sources", "choice_sequences", "choice_paths", "choice_depths")
_OF_READS = ("read_sequences", "read_slots")
_OF_NODES = ("draft_ids", "parent_rows", "paths")
_OF_SEQUENCES = (
    *("first_rows", "known", "samples", "drafts", "room", "widths", "last_reads"),
    *("top_k", "seeds", "nearly_greedy", "prompt_tokens", "places", "ends_from"),
)
_FLOATS_OF_SEQUENCES = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_MOST_MOVES = MOST_SEQUENCES * MAX_NODES


def fields(table_width: int) -> dict[str, Field]:
    """All fields; the block tables come last."""
    whole = torch.int64
    found: dict[str, Field] = dict.fromkeys((*_OF_ROWS, *_OF_CHOICES, *_OF_READS), ((MOST_ROWS,), whole))
    found |= dict.fromkeys(_OF_SEQUENCES, ((MOST_SEQUENCES,), whole))
    found |= dict.fromkeys(_FLOATS_OF_SEQUENCES, ((MOST_SEQUENCES,), torch.float64))
    found |= dict.fromkeys(_OF_NODES, ((MOST_SEQUENCES, MAX_NODES), whole))
    found |= {"end_ids": ((MOST_SEQUENCES, _MOST_ENDS), whole)}
    found |= dict.fromkeys(("moves_from", "moves_to"), ((_MOST_MOVES,), whole))
    return found | {"tables": ((MOST_SEQUENCES, table_width), whole)}


@dataclass(frozen=True)
class Filled:
    """What the host knows of a step besides the fields."""

    shape: StepShape
    long_reads: list[tuple[Part, range]]
    """Slots of known tokens that the module has to read before those in the fields."""
    flat: bool
    """Whether the backbone reads more than the fields hold: a chunk of a prompt."""


@dataclass
class _Rows:
    """Fields while they are written."""

    columns: dict[str, list[int]] = field(default_factory=dict)

    def add(self, **values: Sequence[int] | range) -> None:
        for name, numbers in values.items():
            self.columns.setdefault(name, []).extend(numbers)

    def count(self, name: str) -> int:
        return len(self.columns.get(name, ()))


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


def fill(
    inbox: Inbox, plan: Plan, rules: Mapping[int, Rules], places: Sequence[int], size: int, scratch: int
) -> Filled:
    """Writes the fields for a plan that fits. places: of each sequence's amendments, see adjusting.py. size: positions of a
    block. scratch: a block that padding writes to."""
    parts, rows = plan.parts, _Rows()
    flat = plan.tokens > MOST_ROWS or any(len(part.tokens) > FEW_TOKENS for part in parts)
    few = _FEW_READ if sum(_read_at_most(part, _FEW_READ) for part in parts) <= MOST_ROWS else 0
    long_reads: list[tuple[Part, range]] = []
    row = 0
    for number, part in enumerate(parts):
        paths = ancestry(parents_of(part.judged, part.parents))
        bits = [sum(1 << node - 1 for node in path) for path in paths]
        if not flat:
            _add_tokens(rows, number, part, bits, size)
        if part.samples:
            first = rows.count("sources")
            rows.add(
                sources=range(row + len(part.tokens) - part.judged - 1, row + len(part.tokens)),
                choice_sequences=[number] * (part.judged + 1),
                choice_paths=bits,
                choice_depths=[len(path) for path in paths],
            )
            _set_nodes(inbox, number, part, bits, first)
        else:
            first = 0
            _set_nodes(inbox, number, part, [0], 0)
        slots, certain = _reads(part, few)
        if certain:
            long_reads.append((part, certain))
        last_reads = rows.count("read_slots") - slots.start
        rows.add(read_sequences=[number] * len(slots), read_slots=slots)
        _set_sequence(inbox, number, part, rules[part.sequence], first, last_reads, places[number])
        row += len(part.tokens)
    shape = _shape(parts, rules, rows, inbox.host["tables"].shape[1])
    _write(inbox, plan, rows, shape, size, scratch)
    return Filled(shape, long_reads, flat)


def _add_tokens(rows: _Rows, number: int, part: Part, bits: Sequence[int], size: int) -> None:
    at = range(part.start, part.start + len(part.tokens))
    roots, seen, positions = list(at), [0] * len(at), list(at)
    if part.parents:
        root = part.known - 1
        for node in range(1, part.judged + 1):
            roots[root + node - part.start], seen[root + node - part.start] = root, bits[node]
            positions[root + node - part.start] = root + bits[node].bit_count()
    slots = [part.blocks[slot // size] * size + slot % size for slot in at]
    rows.add(ids=part.tokens, positions=positions, slots=slots, sequences=[number] * len(at))
    rows.add(roots=roots, bits=seen, ends=[slot + 1 for slot in at])


def _certain_drafts(part: Part) -> int:
    """Drafts that are made at least; without a token that ends the text."""
    return part.drafts_after((0,)) if part.samples else 0


def _reads(part: Part, few: int) -> tuple[range, range]:
    """Slots that the module reads, in the fields if there are few: which ones depends on what is accepted. And those before
    them, of known tokens."""
    if not part.module_start or (part.samples and not _certain_drafts(part)):
        return range(0), range(0)
    end = part.known + part.samples * (part.judged + 1)
    if end - part.module_start <= few:
        return range(part.module_start, end), range(0)
    first = max(part.module_start, part.known)
    return range(first, end), range(part.module_start, first)


def _read_at_most(part: Part, few: int) -> int:
    return len(_reads(part, few)[0])


def _set_nodes(inbox: Inbox, number: int, part: Part, bits: Sequence[int], first: int) -> None:
    host, drafts = inbox.host, part.judged_ids if part.samples else ()
    padding = MAX_NODES - len(drafts)
    host["draft_ids"][number] = [*drafts, *[-1] * padding]
    host["parent_rows"][number] = [
        *(first + parent for parent in (parents_of(part.judged, part.parents) if drafts else ())),
        *[0] * padding,
    ]
    host["paths"][number] = [*bits[1:], *(1 << node for node in range(len(drafts), MAX_NODES))]


def _set_sequence(inbox: Inbox, number: int, part: Part, rules: Rules, first: int, last_reads: int, place: int) -> None:
    params = rules.params
    values = {
        "first_rows": first, "known": part.known, "samples": part.samples,
        "drafts": part.drafts if _certain_drafts(part) else 0, "room": part.room, "widths": part.width,
        "last_reads": last_reads, "top_k": params.top_k, "seeds": noise.seed_state(rules.seed),
        "nearly_greedy": params.nearly_greedy, "prompt_tokens": part.prompt_tokens, "places": place,
        "ends_from": params.min_new_tokens, "temperature": params.temperature, "top_p": params.top_p,
        "min_p": params.min_p, "repetition": params.repetition_penalty, "presence": params.presence_penalty,
        "frequency": params.frequency_penalty,
    }  # fmt: skip
    for name, value in values.items():
        inbox.host[name][number] = value
    ends = rules.end_ids[:_MOST_ENDS]
    inbox.host["end_ids"][number] = [*ends, *[-1] * (_MOST_ENDS - len(ends))]


def _shape(parts: Sequence[Part], rules: Mapping[int, Rules], rows: _Rows, table_width: int) -> StepShape:
    params = [rules[part.sequence].params for part in parts]
    drafts = [(_certain_drafts(part), part.width) for part in parts]
    counts = [rows.count(name) for name in ("ids", "sources", "read_slots")]
    read, choices, reads = (rows_bucket(count) if count else 0 for count in counts)
    trees = [(depth, width) for depth, width in drafts if width and depth]
    return StepShape(
        rows=read,
        choices=choices,
        sequences=min(rows_bucket(len(parts)), MOST_SEQUENCES),
        reads=reads,
        width=width_bucket(max(len(part.blocks) for part in parts), table_width),
        chain=max((depth for depth, width in drafts if not width), default=0),
        depth=max((depth for depth, _ in trees), default=0),
        beam=max((width for _, width in trees), default=0),
        sampled=any(not one.greedy for one in params),
        limited=any(not one.greedy and (one.top_k or one.top_p < 1 or one.min_p > 0) for one in params),
        adjusted=any(one.adjusts for one in params),
        trees_judged=any(part.parents for part in parts),
    )


def _write(inbox: Inbox, plan: Plan, rows: _Rows, shape: StepShape, size: int, scratch: int) -> None:
    """Writes the rows, with padding that sees nothing and writes to the scratch block, and the block tables."""
    host = inbox.host
    padded = ((_OF_ROWS, shape.rows), (_OF_CHOICES, shape.choices), (_OF_READS, shape.reads))
    for names, room in padded:
        for name in names:
            numbers = rows.columns.get(name, [])
            host[name][: len(numbers)] = numbers
            host[name][len(numbers) : room] = scratch * size if name == "slots" else 0
    parts, end = plan.parts, shape.sequences
    for name in (*_OF_SEQUENCES, *_FLOATS_OF_SEQUENCES):
        host[name][len(parts) : end] = 1 if name == "repetition" else 0
    host["draft_ids"][len(parts) : end] = -1
    host["parent_rows"][len(parts) : end] = 0
    host["paths"][len(parts) : end] = 1
    tables = host["tables"]
    tables[:end, : shape.width] = scratch
    for number, part in enumerate(parts):
        tables[number, : len(part.blocks)] = part.blocks
    if plan.moves:
        host["moves_from"][: len(plan.moves)], host["moves_to"][: len(plan.moves)] = zip(*plan.moves, strict=True)
