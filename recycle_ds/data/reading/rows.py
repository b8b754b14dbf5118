"""From a row of a file or data set to a document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.report import InvalidRow, ReadReport

if TYPE_CHECKING:
    from recycle_ds.data.reading.chat import ChatTemplate

_MISSING, _NULL_OBJECT = object(), object()
"""In place of a value: no such column; null in place of the object that would contain it."""
# A file without the column is refused after so many rows, instead of being read to its end.
_ENOUGH_ROWS = 10_000


class Rows:
    """Takes documents out of rows, and counts the rows that have none.

    A row whose text is null, or that has no such column while others of its file do, has no document. A row of another type
    than text is an error, or is left out if the options say so.
    """

    def __init__(self, column: str, chat: ChatTemplate | None, skip_invalid: bool, report: ReadReport) -> None:
        self.column = column
        self.report = report
        self._chat, self._skip = chat, skip_invalid
        self._found = self._missing = 0
        self._without: list[str] = []

    def start_file(self) -> None:
        """To be called before the first row of a file: the one before it may not have been read to its end."""
        self._found = self._missing = 0

    def document(self, row: Any, where: str) -> str | None:
        """The document of a row, None for a row that is left out. `where` names the row, in errors and in the report.

        Raises DataError for a row that cannot be used, and for a file of many rows that all lack the column.
        """
        try:
            value = self._value(row, where)
            document: str | None = None
            if not (value is _MISSING or value is _NULL_OBJECT or value is None):
                chat = self._chat
                document = chat.render(value, where, self.column) if chat else _checked(value, where, self.column)
            if document is None:
                self.report.without_text.add(where)
            return document
        except InvalidRow as error:
            self.invalid(error, where)
            return None

    def invalid(self, error: InvalidRow, where: str) -> None:
        """Counts a row or file that cannot be used. Raises DataError unless it may be left out."""
        if not self._skip:
            raise DataError(
                f"{error}; --skip-invalid (data.prepare.skip_invalid) leaves out such rows and files"
            ) from error
        self.report.invalid.add(where)

    def end_file(self, where: str) -> None:
        """To be called after the last row of a file. Raises DataError if all its rows lack the column."""
        if self._missing and not self._found:
            raise missing_column(where, self.column, self._without)

    def _value(self, row: Any, where: str) -> Any:
        if isinstance(row, str) and self._chat is None:  # an array of texts
            return row
        if row is None:
            return None
        if not isinstance(row, Mapping):
            raise InvalidRow(f"{where} is a JSON {type(row).__name__}, not an object; put one JSON object in each row")
        value = value_at(row, self.column)
        if value is _MISSING:
            self._without = self._without if self._missing else list(row)
            self._missing += 1
            if self._missing >= _ENOUGH_ROWS and not self._found:
                raise missing_column(where, self.column, self._without)
        elif value is not _NULL_OBJECT:
            self._found += 1
        return value


def value_at(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, of `data.text` also inside the object `data`; one of the placeholders if there is none."""
    if column in row:
        return row[column]
    for outer in prefixes(column):
        inner = row.get(outer)
        if isinstance(inner, Mapping):
            found = value_at(inner, column[len(outer) + 1 :])
            if found is not _MISSING:
                return found
        elif outer in row and inner is None:
            return _NULL_OBJECT
    return _MISSING


def prefixes(column: str) -> list[str]:
    """The columns that could contain a nested one: a and a.b of a.b.c."""
    parts = column.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def outer_column(column: str, columns: Iterable[str]) -> str | None:
    """The column of a table that is, or could contain, the named one; None if there is none."""
    found = set(columns)
    return next((name for name in (column, *prefixes(column)) if name in found), None)


def missing_column(where: str, column: str, columns: Iterable[str]) -> DataError:
    """The error for a file without the column, with those that it has."""
    found = ", ".join(map(str, columns)) or "none"
    hint = (
        "; `recycle-ds prepare` reads chat rows with --chat-column" if column == "text" and "messages" in found else ""
    )
    return DataError(f"{where} has no column {column!r}; its columns are: {found}; name one as the text column{hint}")


def _checked(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise InvalidRow(f"{where}: column {column!r} is of type {type(value).__name__}, not text; name another column")
    return checked_text(value, where, column)


def checked_text(value: str, where: str, column: str) -> str:
    """`value`, if it can be written as UTF-8; JSON can have an unpaired surrogate, UTF-8 cannot. Raises InvalidRow."""
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRow(
                f"{where}: column {column!r} contains an unpaired surrogate at character {error.start}; repair the text"
            ) from error
    return value
