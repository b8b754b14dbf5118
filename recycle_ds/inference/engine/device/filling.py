"""Writes a plan into the fields of fields.py, with padding that sees nothing and writes to the scratch block.

A GPU computes a step of a small model in less than a millisecond, and the host writes the next one meanwhile. So what is the
same in all steps of a sequence is written once, and what is computed for every row is computed for all rows together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_

import numpy as np
from numpy.typing import NDArray

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

Numbers = NDArray[np.int64]

_FEW_READ = 16
"""Slots of one sequence up to which the module reads them with those of others."""
_PADDING_OF_REQUESTS = {"repetition": 1}
"""Of sequences that there are not; 0 for all other fields."""
_NO_NODES = (np.array(-1), np.array(0), np.left_shift(1, np.arange(MAX_NODES)))
"""Ids, rows of the parents and paths, as bits, of nodes that there are not."""


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


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a plan are among the rows, by part."""

    counts: list[int]
    """Tokens."""
    ends: list[int]
    """Rows behind the last token."""
    choices: list[int]
    """Rows with logits; 0 for a chunk that ends inside a prompt."""

    @staticmethod
    def of(parts: Sequence[Part]) -> _Layout:
        counts, ends, end = [], [], 0
        for part in parts:
            counts.append(len(part.tokens))
            end += counts[-1]
            ends.append(end)
        return _Layout(counts, ends, [part.judged + 1 if part.samples else 0 for part in parts])


class Filling:
    """Fills the fields of an inbox, plan after plan. It knows what it has written before."""

    def __init__(self, inbox: Inbox, size: int, scratch: int) -> None:
        """size: positions of a block. scratch: a block that padding writes to."""
        self._host = inbox.host
        self._size, self._scratch = size, scratch
        self._tables = self._whole("tables")
        self._tables[:] = scratch
        self._blocks: list[tuple[int, ...]] = [()] * len(self._tables)
        self._rules: list[Rules] = []
        self._requests: list[_Request] = []
        self._places: list[int] = []
        self._padded = 0

    def fill(self, plan: Plan, rules: Mapping[int, Rules], places: Sequence[int]) -> Filled:
        """Writes a plan that fits, see `fits`. places: of each sequence's amendments, see adjusting.py."""
        parts, layout = plan.parts, _Layout.of(plan.parts)
        end = min(rows_bucket(len(parts)), MOST_SEQUENCES)
        flat = layout.ends[-1] > MOST_ROWS or max(layout.counts) > FEW_TOKENS
        judged = {
            number: ancestry(parents_of(part.judged, part.parents)) for number, part in enumerate(parts) if part.judged
        }
        self._write_tables(parts, end)
        self._write_requests([rules[part.sequence] for part in parts], list(places), end)
        first_rows, choices = self._write_choices(parts, layout, judged, end)
        last_reads, reads, long_reads = self._write_reads(parts)
        drafts = [_certain_drafts(part) for part in parts]
        own: tuple[Sequence[int], ...] = (
            first_rows, [part.known for part in parts], [part.samples for part in parts], drafts,
            [part.room for part in parts], [part.width for part in parts], last_reads,
            [part.prompt_tokens for part in parts],
        )  # fmt: skip
        for name, numbers in zip(OF_SEQUENCES, own, strict=True):
            self._pad(name, numbers, end)
        if plan.moves:
            for name, slots in zip(("moves_from", "moves_to"), zip(*plan.moves, strict=True), strict=True):
                self._whole(name)[: len(slots)] = slots
        shape = self._shape(parts, drafts, 0 if flat else layout.ends[-1], choices, reads, end)
        if not flat:
            self._write_tokens(parts, layout, judged, shape.rows)
        return Filled(shape, long_reads, flat)

    def _whole(self, name: str) -> Numbers:
        found = self._host[name]
        assert found.dtype == np.int64, name
        return found  # type: ignore[return-value]

    def _pad(self, name: str, numbers: Sequence[float] | Numbers, room: int, padding: int = 0) -> None:
        field = self._host[name]
        field[: len(numbers)] = numbers
        field[len(numbers) : room] = padding

    def _write_tables(self, parts: Sequence[Part], end: int) -> None:
        """Behind its blocks, a row has the scratch block only."""
        for number in range(end):
            blocks = parts[number].blocks if number < len(parts) else ()
            if blocks != self._blocks[number]:
                row = self._tables[number]
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
            self._pad(name, numbers, end, _PADDING_OF_REQUESTS.get(name, 0))
        ends = self._whole("end_ids")
        ends[: len(rules)], ends[len(rules) : end] = [one.ends for one in self._requests], -1
        self._padded = end

    def _write_tokens(
        self, parts: Sequence[Part], layout: _Layout, judged: Mapping[int, list[tuple[int, ...]]], room: int
    ) -> None:
        sequences = np.repeat(np.arange(len(parts)), layout.counts)
        starts = [part.start - end + count for part, count, end in zip(parts, layout.counts, layout.ends, strict=True)]
        at = np.arange(len(sequences)) + np.repeat(starts, layout.counts)
        slots = self._tables[sequences, at // self._size] * self._size + at % self._size
        ids = list(chain.from_iterable(part.tokens for part in parts))
        for name, numbers in zip(OF_ROWS, (ids, at, slots, sequences, at, np.zeros_like(at), at + 1), strict=True):
            self._pad(name, numbers, room, self._scratch * self._size if name == "slots" else 0)
        positions, roots, bits = (self._whole(name) for name in ("positions", "roots", "bits"))
        for number, paths in judged.items():
            part, end = parts[number], layout.ends[number]
            if part.parents:
                nodes, root = slice(end - part.judged, end), part.known - 1
                roots[nodes], bits[nodes] = root, [_bits(path) for path in paths[1:]]
                positions[nodes] = [root + len(path) for path in paths[1:]]

    def _write_choices(
        self, parts: Sequence[Part], layout: _Layout, judged: Mapping[int, list[tuple[int, ...]]], end: int
    ) -> tuple[list[int], int]:
        """Rows with logits, and the drafts that they judge. Returns the first row of each part, and their number."""
        nodes = [self._whole(name)[:end] for name in OF_NODES]
        for field, padding in zip(nodes, _NO_NODES, strict=True):
            field[:] = padding
        first_rows, count = [], 0
        for choices in layout.choices:
            first_rows.append(count if choices else 0)
            count += choices
        room = rows_bucket(count)
        sequences = np.repeat(np.arange(len(parts)), layout.choices)
        before = [
            end - choices - first for end, choices, first in zip(layout.ends, layout.choices, first_rows, strict=True)
        ]
        sources = np.arange(count) + np.repeat(before, layout.choices)
        none = np.zeros(count, dtype=np.int64)
        for name, numbers in zip(OF_CHOICES, (sources, sequences, none, none), strict=True):
            self._pad(name, numbers, room)
        for number, paths in judged.items():
            part, first = parts[number], first_rows[number]
            if not part.samples:
                continue
            rows, drafts, bits = slice(first, first + part.judged + 1), slice(part.judged), [*map(_bits, paths)]
            self._whole("choice_paths")[rows], self._whole("choice_depths")[rows] = bits, [*map(len, paths)]
            own = (part.judged_ids, [first + one for one in parents_of(part.judged, part.parents)], bits[1:])
            for field, numbers in zip(nodes, own, strict=True):
                field[number, drafts] = numbers
        return first_rows, count

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
        for name, numbers in zip(OF_READS, (sequences_M, slots_M), strict=True):
            self._pad(name, numbers, rows_bucket(len(slots_M)))
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
            width=width_bucket(max(len(part.blocks) for part in parts), self._tables.shape[1]),
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
