"""Writes a plan into the fields of fields.py, with padding that sees nothing and writes to the scratch block.

A GPU computes a step of a small model in less than a millisecond, and the host writes the next one meanwhile. So what is the
same in all steps of a sequence is written once, and fields are written together: NumPy takes about as long for one number
as for hundreds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_

import numpy as np

from recycle_ds.inference.engine.device.buffers import Inbox
from recycle_ds.inference.engine.device.fields import (
    FEW_TOKENS,
    FLOATS_OF_REQUESTS,
    MOST_ENDS,
    MOST_ROWS,
    MOST_SEQUENCES,
    OF_CHOICES,
    OF_NODES,
    OF_READS,
    OF_REQUESTS,
    OF_ROWS,
    OF_SEQUENCES,
)
from recycle_ds.inference.engine.device.step_shape import StepShape, rows_bucket, width_bucket
from recycle_ds.inference.engine.plan import Part, Plan, Rules
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.tree import MAX_NODES, ancestry, parents_of

_FEW_READ = 16
"""Slots of one sequence up to which the module reads them with those of others."""
_PADDING_OF_REQUESTS = {"repetition": 1}
"""Of sequences that there are not; 0 for all other fields."""
_NO_NODES = np.array([[[-1] * MAX_NODES], [[0] * MAX_NODES], [[1 << node for node in range(MAX_NODES)]]])
"""Ids, rows of the parents and paths, as bits, of nodes that there are not."""
_Paths = list[tuple[int, ...]]
_ROOT: _Paths = [()]
"""The paths of a part without drafts."""


@dataclass(frozen=True)
class Filled:
    """What the host knows of a step besides the fields."""

    shape: StepShape
    long_reads: list[tuple[Part, range]]
    """Slots of known tokens that the module has to read before those in the fields."""
    flat: bool
    """Whether the backbone reads more than the fields hold: a chunk of a prompt."""


@dataclass(frozen=True)
class _Request:
    """The numbers of a request, in the order of their fields."""

    whole: tuple[int, ...]
    floats: tuple[float, ...]
    ends: tuple[int, ...]
    sampled: bool
    limited: bool
    adjusted: bool

    @staticmethod
    def of(rules: Rules, place: int) -> _Request:
        params, ends = rules.params, rules.end_ids[:MOST_ENDS]
        limits = bool(params.top_k) or params.top_p < 1 or params.min_p > 0
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        return _Request(
            (place, params.top_k, noise.seed_state(rules.seed), params.nearly_greedy, params.min_new_tokens),
            (params.temperature, params.top_p, params.min_p, *penalties),
            (*ends, *[-1] * (MOST_ENDS - len(ends))),
            sampled=not params.greedy,
            limited=limits and not params.greedy,
            adjusted=params.adjusts,
        )


class _Together:
    """Fields that are written together, and what they have where nothing is written."""

    def __init__(self, inbox: Inbox, names: Sequence[str], padding: Mapping[str, int] | None = None) -> None:
        self._numbers = inbox.together(names)
        self._padding = np.array([[(padding or {}).get(name, 0)] for name in names])

    def write(self, columns: Sequence[Sequence[int]], room: int) -> None:
        """Writes a column to each field, and the padding behind it up to `room`."""
        size = len(columns[0])
        if size:
            self._numbers[:, :size] = columns
        self._numbers[:, size:room] = self._padding


class Filling:
    """Fills the fields of an inbox, plan after plan. It knows what it has written before."""

    def __init__(self, inbox: Inbox, size: int, scratch: int) -> None:
        """size: positions of a block. scratch: a block that padding writes to."""
        self._host, self._size, self._scratch = inbox.host, size, scratch
        self._rows = _Together(inbox, OF_ROWS, {"slots": scratch * size})
        self._choices, self._reads = _Together(inbox, OF_CHOICES), _Together(inbox, OF_READS)
        self._sequences = _Together(inbox, OF_SEQUENCES)
        self._nodes = inbox.together(OF_NODES)
        self._tables, self._end_ids, self._moves = (
            inbox.together(names) for names in (("tables",), ("end_ids",), ("moves_from", "moves_to"))
        )
        self._tables[:] = scratch
        self._blocks: list[tuple[int, ...]] = [()] * self._tables.shape[1]
        self._rules: list[Rules] = []
        self._requests: list[_Request] = []
        self._places: list[int] = []
        self._padded = 0

    def fill(self, plan: Plan, rules: Mapping[int, Rules], places: Sequence[int]) -> Filled:
        """Writes a plan that fits, see `fits`. places: of each sequence's amendments, see adjusting.py."""
        parts, tokens = plan.parts, plan.tokens
        end = min(rows_bucket(len(parts)), MOST_SEQUENCES)
        flat = tokens > MOST_ROWS or any(len(part.tokens) > FEW_TOKENS for part in parts)
        paths = {
            number: ancestry(parents_of(part.judged, part.parents)) for number, part in enumerate(parts) if part.judged
        }
        self._write_tables(parts, end)
        self._write_requests([rules[part.sequence] for part in parts], list(places), end)
        first_rows, choices = self._write_choices(parts, paths, end)
        last_reads, reads, long_reads = self._write_reads(parts)
        drafts = [_certain_drafts(part) for part in parts]
        own: tuple[Sequence[int], ...] = (
            first_rows, [part.known for part in parts], [part.samples for part in parts], drafts,
            [part.room for part in parts], [part.width for part in parts], last_reads,
            [part.prompt_tokens for part in parts],
        )  # fmt: skip
        self._sequences.write(own, end)
        if plan.moves:
            self._moves[:, : len(plan.moves)] = (*zip(*plan.moves, strict=True),)
        shape = self._shape(parts, drafts, 0 if flat else tokens, choices, reads, end)
        if not flat:
            self._write_tokens(parts, paths, shape.rows)
        return Filled(shape, long_reads, flat)

    def _write_tables(self, parts: Sequence[Part], end: int) -> None:
        """Behind its blocks, a row has the scratch block only."""
        for number in range(end):
            blocks = parts[number].blocks if number < len(parts) else ()
            if blocks != self._blocks[number]:
                row = self._tables[0, number]
                row[: len(blocks)], row[len(blocks) :] = blocks, self._scratch
                self._blocks[number] = blocks

    def _write_requests(self, rules: list[Rules], places: list[int], end: int) -> None:
        known = len(rules) == len(self._rules) and all(map(is_, rules, self._rules)) and places == self._places
        if known and end == self._padded:
            return
        if not known:
            before = {id(one): number for number, one in enumerate(self._rules)}
            found = []
            for one, place in zip(rules, places, strict=True):
                number = before.get(id(one))
                is_known = number is not None and self._places[number] == place
                found.append(self._requests[number] if is_known and number is not None else _Request.of(one, place))
            self._requests, self._rules, self._places = found, rules, places
        columns = (*zip(*(one.whole for one in self._requests), strict=True),)
        floats = (*zip(*(one.floats for one in self._requests), strict=True),)
        for name, numbers in zip((*OF_REQUESTS, *FLOATS_OF_REQUESTS), (*columns, *floats), strict=True):
            field = self._host[name]
            field[: len(rules)], field[len(rules) : end] = numbers, _PADDING_OF_REQUESTS.get(name, 0)
        ends = self._end_ids[0]
        ends[: len(rules)], ends[len(rules) : end] = [one.ends for one in self._requests], -1
        self._padded = end

    def _write_tokens(self, parts: Sequence[Part], paths: Mapping[int, _Paths], room: int) -> None:
        ids, at, slots, sequences, size = list[int](), list[int](), list[int](), list[int](), self._size
        trees: list[tuple[int, int]] = []
        for number, part in enumerate(parts):
            own, blocks = range(part.start, part.start + len(part.tokens)), part.blocks
            ids += part.tokens
            at += own
            slots += [blocks[one // size] * size + one % size for one in own]
            sequences += [number] * len(own)
            if part.parents:
                trees.append((number, len(at)))
        roots, positions, bits, ends = list(at), list(at), [0] * len(at), [one + 1 for one in at]
        for number, end in trees:
            part = parts[number]
            nodes, root = slice(end - part.judged, end), part.known - 1
            roots[nodes], bits[nodes] = [root] * part.judged, [_bits(path) for path in paths[number][1:]]
            positions[nodes] = [root + len(path) for path in paths[number][1:]]
        self._rows.write((ids, positions, slots, sequences, roots, bits, ends), room)

    def _write_choices(self, parts: Sequence[Part], paths: Mapping[int, _Paths], end: int) -> tuple[list[int], int]:
        """Rows with logits, and the drafts that they judge. Returns the first row of each part, and their number."""
        self._nodes[:, :end] = _NO_NODES
        first_rows, sources, sequences, bits, depths = (list[int]() for _ in range(5))
        row = 0
        for number, part in enumerate(parts):
            row += len(part.tokens)
            first, judged = len(sources), part.judged
            first_rows.append(first if part.samples else 0)
            if not part.samples:
                continue
            sources += range(row - judged - 1, row)
            sequences += [number] * (judged + 1)
            own = paths[number] if judged else _ROOT
            bits += map(_bits, own)
            depths += map(len, own)
            if judged:
                before = [first + one for one in parents_of(judged, part.parents)]
                self._nodes[:, number, :judged] = part.judged_ids, before, bits[first + 1 :]
        self._choices.write((sources, sequences, bits, depths), rows_bucket(len(sources)))
        return first_rows, len(sources)

    def _write_reads(self, parts: Sequence[Part]) -> tuple[list[int], int, list[tuple[Part, range]]]:
        """Slots that the module reads. Returns where each part's would be if they began with slot 0, their number, and those
        of known tokens that do not belong into the fields."""
        found = {number: _reads(part, _FEW_READ) for number, part in enumerate(parts) if part.module_start}
        if sum(len(slots) for slots, _ in found.values()) > MOST_ROWS:
            found = {number: _reads(parts[number], 0) for number in found}
        last_reads, slots_M, sequences_M = [0] * len(parts), list[int](), list[int]()
        for number, (slots, _) in found.items():
            last_reads[number] = len(slots_M) - slots.start
            slots_M += slots
            sequences_M += [number] * len(slots)
        self._reads.write((sequences_M, slots_M), rows_bucket(len(slots_M)))
        return last_reads, len(slots_M), [(parts[number], certain) for number, (_, certain) in found.items() if certain]

    def _shape(
        self, parts: Sequence[Part], drafts: Sequence[int], rows: int, choices: int, reads: int, end: int
    ) -> StepShape:
        trees = [(depth, part.width) for depth, part in zip(drafts, parts, strict=True) if depth and part.width]
        return StepShape(
            rows=rows_bucket(rows),
            choices=rows_bucket(choices),
            sequences=end,
            reads=rows_bucket(reads),
            width=width_bucket(max(len(part.blocks) for part in parts), self._tables.shape[2]),
            chain=max((depth for depth, part in zip(drafts, parts, strict=True) if not part.width), default=0),
            depth=max((depth for depth, _ in trees), default=0),
            beam=max((width for _, width in trees), default=0),
            sampled=any(one.sampled for one in self._requests),
            limited=any(one.limited for one in self._requests),
            adjusted=any(one.adjusted for one in self._requests),
            trees_judged=any(part.parents for part in parts),
        )


def _bits(path: Sequence[int]) -> int:
    return sum(1 << node - 1 for node in path)


def _certain_drafts(part: Part) -> int:
    """Drafts that are made at least; without a token that ends the text."""
    return part.drafts_after((0,)) if part.samples and part.drafts else 0


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
