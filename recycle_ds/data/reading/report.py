"""What was read of a source, and what was left out and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from recycle_ds.data.errors import DataError

_LISTED = 20  # files that are listed one by one; of more, only the first ones and counts
_HELD_OUT = re.compile(r"(^|[/._-])(test|tests|dev|valid|validation|eval|heldout)([/._-]|$)", re.IGNORECASE)
_NAMED = 3  # examples named for each reason


@dataclass
class LeftOut:
    """Rows, files or folders that were left out for one reason."""

    count: int = 0
    """How many."""
    first: list[str] = field(default_factory=list)
    """Places of the first ones."""

    def add(self, place: str, count: int = 1) -> None:
        """Counts `count` more, of which `place` names one."""
        self.count += count
        if len(self.first) < _NAMED:
            self.first.append(place)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return f"{', '.join(self.first)}{more}"


@dataclass
class ReadReport:
    """Filled while a source is read; complete when its last document has been read."""

    files: dict[str, int] = field(default_factory=dict)
    """Files that were read, and the number of documents in each."""
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """Files that were not read, by reason."""
    without_text: LeftOut = field(default_factory=LeftOut)
    """Rows whose text is null or missing."""
    invalid: LeftOut = field(default_factory=LeftOut)
    """Rows and files that cannot be used; left out only if the options say so, else an error."""
    byte_order_marks: int = 0
    """Byte-order marks removed behind the start of a file, where files were joined."""
    line_ends: int = 0
    """Text files whose line ends were CR or CR LF and are now LF."""

    def leave_out(self, reason: str, place: str, count: int = 1) -> None:
        """Counts `count` files that are not read, of which `place` names one."""
        self.left_out.setdefault(reason, LeftOut()).add(place, count)

    def lines(self, *, read: bool = True) -> Iterator[str]:
        """The report for a terminal, one fact per line. read: False for what was left out or changed only."""
        if read:
            yield from _files(self.files)
        held_out = [name for name in self.files if _HELD_OUT.search(name)]
        if held_out and len(held_out) < len(self.files):
            first = ", ".join(held_out[:_NAMED])
            yield f"note: evaluation splits, by their names, are read too ({len(held_out)}), unless --exclude is given: {first}"
        for reason, entry in self.left_out.items():
            yield f"left out: {counted(entry.count, 'file')}, {reason}: {entry}"
        yield from self.row_lines()

    def row_lines(self) -> Iterator[str]:
        """The part about rows and characters."""
        if self.without_text.count:
            yield f"left out: {counted(self.without_text.count, 'row')} without text: {self.without_text}"
        if self.invalid.count:
            yield f"left out: {counted(self.invalid.count, 'invalid row or file', 'invalid rows or files')}: {self.invalid}"
        if self.byte_order_marks:
            yield f"removed: {counted(self.byte_order_marks, 'byte-order mark')} inside files, where files were joined"
        if self.line_ends:
            yield f"changed: line ends of {counted(self.line_ends, 'text file')}, from CR or CR LF to LF"


@dataclass(frozen=True)
class ReadingOptions:
    """What is read of a source, and what happens to rows that cannot be used."""

    skip_invalid: bool = False
    """Leave out and count rows and files that cannot be used (broken JSON, other types than text, not UTF-8); by default the
    first one is an error."""
    all_files: bool = False
    """Read hidden files and dataset cards (README.md and the like) of a folder too."""
    exclude: tuple[str, ...] = ()
    """Patterns of files that are left out, such as `*test*`: of the name, or of the path within the folder."""


class InvalidRow(DataError):
    """A row or file that can be left out, if the options say so."""


def _files(files: dict[str, int]) -> Iterator[str]:
    if not files:
        return
    documents = f"read: {counted(len(files), 'file')}, {counted(sum(files.values()), 'document')}"
    if len(files) <= _LISTED:
        yield documents + ": " + ", ".join(f"{name} ({count:,})" for name, count in files.items())
        return
    kinds = Counter(kind_of(name) for name in files)
    yield documents + ": " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def kind_of(name: str) -> str:
    """The suffixes by which a file is recognised: .jsonl.gz of part-1.JSONL.gz."""
    from recycle_ds.data.reading.packings import split_suffixes

    kind, packing = split_suffixes(name)
    return f"{kind}{packing}" or "no suffix"


def counted(count: int, one: str, several: str = "") -> str:
    """A number with what it counts."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"
