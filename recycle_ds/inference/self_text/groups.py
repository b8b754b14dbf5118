"""Groups of finished rows: one file each in the parts folder, published at once. Which group a process writes next.

Processes share only the folder. A process writes the groups of its own number first; when none of these is needed any
more, it writes those that others have not finished in their usual time (see `Takeover`), which are the same whoever writes
them. So no process waits for one that has been lost for longer than that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.self_text.rows import TRAIN, VALIDATION

_NAME = re.compile(rf"({TRAIN}|{VALIDATION})-(\d{{7}})-(\d+)\.jsonl")


@dataclass(frozen=True, order=True)
class Group:
    """A number of consecutive rows of a side."""

    side: str
    number: int


class GroupFolder:
    """The finished groups in a folder. A file's name has the group's tokens, so that a look at the folder suffices."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finished(self) -> dict[Group, int]:
        """The tokens of each finished group, end-of-document tokens included."""
        return {group: tokens for group, (tokens, _) in self._files().items()}

    def publish(self, group: Group, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stores a group's rows, unless another process has done so. Raises OSError."""
        if group in self._files():
            return
        tokens = sum(len(row["ids"]) + 1 for row in rows if row["ids"])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self._folder / f"{group.side}-{group.number:07d}-{tokens}.jsonl", text)

    def rows(self, side: str) -> Iterator[dict[str, Any]]:
        """The rows of all finished groups of a side, in order. Raises DecodingError for a damaged file."""
        for _, (_, path) in sorted((group, found) for group, found in self._files().items() if group.side == side):
            try:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            except ValueError:
                raise DecodingError(f"{path}: damaged; remove it, and the same command writes it again") from None
            yield from rows

    def _files(self) -> dict[Group, tuple[int, Path]]:
        found: dict[Group, tuple[int, Path]] = {}
        for path in sorted(self._folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match:
                found.setdefault(Group(match[1], int(match[2])), (int(match[3]), path))
        return found


@dataclass(frozen=True)
class Choice:
    """A group to be written. own: whether it has the process's own number; otherwise another process has not finished it."""

    group: Group
    own: bool


@dataclass(frozen=True)
class Demand:
    """What must be written: `held_out` groups of the evaluation side, and as many groups to train on as have `tokens`.

    largest: most tokens that a group can have. limit: number of groups that can be written at all; None: any number.
    patience: how many of the first groups may be without text before the job gives up. least: tokens of a group on average
    below which it gives up after these.
    """

    held_out: int
    tokens: int
    largest: int
    limit: int | None = None
    patience: int = 4
    least: float = 0.0

    def needed(self, finished: Mapping[Group, int]) -> int:
        """How many groups to train on are needed, from the first. Exact if all of these are finished, else an estimate
        from those that are."""
        known = {group.number: tokens for group, tokens in finished.items() if group.side == TRAIN}
        found = sum(known.values())
        usual = found / len(known) if found else self.largest
        if found <= self.least * len(known) and all(number in known for number in range(self.patience)):
            raise DecodingError(
                f"the first {len(known)} groups have only {found} tokens, because fewer than one row in a hundred has enough "
                "text of the model's own: lower --min-tokens, allow more --repeats, or use other prompts or temperatures"
            )
        total, number, end = 0.0, 0, max(known, default=-1) + 1
        while total < self.tokens and number < end and number != self.limit:
            total += known.get(number, usual)
            number += 1
        if total < self.tokens:
            number += math.ceil((self.tokens - total) / usual)
        return number if self.limit is None else min(number, self.limit)

    def next_group(self, finished: Mapping[Group, int], rank: int, world_size: int) -> Choice | None:
        """The group that a process writes next; None if all are finished. Raises DecodingError if hardly a row has any text."""
        count = self.held_out + self.needed(finished)  # may be very many: no list of all

        def missing(start: int, step: int) -> Iterator[Group]:
            places = range(start, count, step)
            groups = (
                Group(VALIDATION, place) if place < self.held_out else Group(TRAIN, place - self.held_out)
                for place in places
            )
            return (group for group in groups if group not in finished)

        own = next(missing(rank, world_size), None)
        if own is not None:
            return Choice(own, own=True)
        others = list(islice(missing(0, 1), world_size))
        return Choice(others[rank % len(others)], own=False) if others else None
