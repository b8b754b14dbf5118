"""Rows of JSON files: one object per line, or arrays, or objects one after the other."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from recycle_ds.data.reading.packings import Packed
from recycle_ds.data.reading.report import InvalidRow
from recycle_ds.data.reading.rows import Rows

MARK = "\ufeff"
_BLANK = " \t\r\n" + MARK
_CHUNK = 1 << 20  # bytes read at a time
_LONGEST_FIRST_LINE = 1 << 24  # bytes of a line that are parsed to find out how a .json file is laid out

_parse = json.JSONDecoder().raw_decode


def read_lines(path: Path, packed: Packed, rows: Rows) -> Iterator[str | None]:
    """Documents of JSON lines; None for a line without one. Lines end in LF, CR LF or CR.

    Several objects on one line, as of files that were joined without a line end, are read too, and byte-order marks between
    them are dropped and counted.
    """
    offset = 0
    for number, line in enumerate(_split(packed.open()), start=1):
        where = f"{path}:{number}"
        try:
            text = decode(line, path, offset)
            found = list(_values(text, where, rows, first=offset == 0))
        except InvalidRow as error:
            rows.invalid(error, where)
            found = []
            yield None
        offset += len(line)
        for value in found:
            yield rows.document(value, where)
    rows.end_file(str(path))


def read_array(path: Path, packed: Packed, rows: Rows) -> Iterator[str | None]:
    """Documents of a .json file: JSON lines if its first line is an object, else an array of rows, or objects one after the
    other."""
    if _is_object(packed.open().readline(_LONGEST_FIRST_LINE)):
        yield from read_lines(path, packed, rows)
        return
    values = _stream_of_values(path, packed.open(), rows)
    for number in itertools.count(1):
        where = f"{path} row {number}"
        try:
            value = next(values, _END)
        except InvalidRow as error:  # what follows cannot be told apart into rows
            rows.invalid(error, f"{where} and what follows")
            break
        if value is _END:
            break
        yield rows.document(value, where)
    rows.end_file(str(path))


def decode(content: bytes, path: Path, offset: int) -> str:
    """Decodes `content`, which starts at byte `offset` of the decompressed file. Raises InvalidRow if it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRow(not_utf8(path, offset + error.start, content[error.start], content[:2])) from error


def not_utf8(path: Path, offset: int, byte: int, start: bytes) -> str:
    """The message for a file in another encoding."""
    looks = " (it looks like UTF-16)" if offset < 2 and start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
    return f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset}{looks}; convert it to UTF-8"


_END = object()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _split(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines of a file; JSON has no CR inside strings, so that it may end a line as well."""
    for line in stream:
        if b"\r" in line.rstrip(b"\r\n"):
            yield from line.splitlines(keepends=True)
        else:
            yield line


def _values(text: str, where: str, rows: Rows, first: bool) -> Iterator[Any]:
    """The JSON values of a line, normally one. Raises InvalidRow."""
    position = 0
    while True:
        start = position
        while position < len(text) and text[position] in _BLANK:
            position += 1
        marks = text.count(MARK, start, position)
        rows.report.byte_order_marks += marks - (1 if first and start == 0 and text[:1] == MARK else 0)
        if position == len(text):
            return
        try:
            value, position = _parse(text, position)
        except (ValueError, RecursionError) as error:
            raise InvalidRow(f"{where} is not JSON: {_reason(error)}; put one JSON object on each line") from error
        yield value


def _stream_of_values(path: Path, stream: IO[bytes], rows: Rows) -> Iterator[Any]:
    """The values of arrays, or values one after the other, with only a part of the file in memory. Raises InvalidRow."""
    text = _Text(path, stream)
    inside = False  # an array
    for number in itertools.count(1):
        where = f"{path} row {number}"
        after_value = inside and number > 1
        while True:  # up to the next value
            rows.report.byte_order_marks += text.skip_blank()
            character = text.character()
            if character == "[" and not inside:
                inside, after_value = True, False
            elif character == "]" and inside:
                inside = after_value = False
            elif character == "," and after_value:
                after_value = False
                text.skip()
                break
            else:
                break
            text.skip()
        rows.report.byte_order_marks += text.skip_blank()
        if not text.character():
            if inside:
                raise InvalidRow(f"{where}: the file ends inside an array; is it cut?")
            return
        if after_value:
            raise InvalidRow(f"{where} is not JSON: no comma before it; write an array of objects")
        yield text.value(where)


class _Text:
    """The text of a file from the next value on, read in chunks."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path, self._stream = path, stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._position, self._ended, self._start = "", 0, False, True

    def character(self) -> str:
        """The next character; "" at the end of the file."""
        while self._position == len(self._text) and not self._ended:
            self._extend()
        return self._text[self._position : self._position + 1]

    def skip(self) -> None:
        self._position += 1

    def skip_blank(self) -> int:
        """Moves to the next character that is not blank; returns the number of byte-order marks behind the file's start."""
        marks = 0
        while (character := self.character()) and character in _BLANK:
            marks += character == MARK and not self._start
            self._start = False
            self._position += 1
        self._start = False
        return marks

    def value(self, where: str) -> Any:
        """The value that starts here. Raises InvalidRow."""
        while True:
            try:
                value, position = _parse(self._text, self._position)
                if position < len(self._text) or self._ended:  # a number could go on in the next chunk
                    self._position = position
                    return value
            except (ValueError, RecursionError) as error:
                if self._ended or not _is_cut(error, len(self._text)):
                    raise InvalidRow(f"{where} is not JSON: {_reason(error)}; write an array of objects") from error
            size = len(self._text) - self._position  # a long value is parsed again each time its text has doubled
            while not self._ended and len(self._text) - self._position < 2 * size:
                self._extend()

    def _extend(self) -> None:
        """Drops the text before the position and appends the next chunk. Raises InvalidRow if it is not UTF-8."""
        chunk = self._stream.read(_CHUNK)
        self._ended = not chunk
        try:
            more = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02x}"
            raise InvalidRow(f"{self._path} is not UTF-8: byte {byte}; convert it to UTF-8") from error
        self._text, self._position = self._text[self._position :] + more, 0


def _is_cut(error: Exception, size: int) -> bool:
    """Whether a value was not parsed because its end is in the next chunk."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= size - len("\\ud83d\\ude00")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
