"""Checksums in the zip archives that torch.save writes. torch.load does not verify them."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import IO


class FilePart(io.RawIOBase):
    """`length` bytes of an open file from `start`, as a file object."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        """See io.IOBase."""
        return True

    def seekable(self) -> bool:
        """See io.IOBase."""
        return True

    def tell(self) -> int:
        """See io.IOBase."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io.IOBase. Raises OSError for a position before the first byte."""
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if position < 0:
            raise OSError(f"seek to {position}")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        """See io.IOBase."""
        remaining = max(self._length - self._position, 0)
        self._file.seek(self._start + self._position)
        data = self._file.read(remaining if size is None or size < 0 else min(size, remaining))
        self._position += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See io.RawIOBase."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def archive_fault(archive: Path | IO[bytes] | FilePart) -> str | None:
    """The problem with an archive in words; None if every checksum matches. It is read once, in small blocks."""
    try:
        with zipfile.ZipFile(archive) as opened:
            member = opened.testzip()
    except Exception as error:  # a damaged archive can raise nearly any exception
        return one_line(error) or type(error).__name__
    # torch.serialization.set_crc32_options(False) saves without checksums, which looks the same as damage
    return None if member is None else f"checksum mismatch in {one_line(member)}, unless it was saved without checksums"


def one_line(text: object) -> str:
    """A text from outside for use in an error message: without line breaks, at most 160 characters of it."""
    words = " ".join(str(text).split())
    return words if len(words) <= 160 else f"{words[:160]}..."
