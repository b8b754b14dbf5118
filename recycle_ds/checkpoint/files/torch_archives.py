"""The checksums in the zip archives that torch.save writes: torch.load never looks at them."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import IO


class FilePart(io.RawIOBase):
    """`length` bytes of an open file from `start`, as a file of their own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """See io.IOBase."""
        return True

    def seekable(self) -> bool:
        """See io.IOBase."""
        return True

    def tell(self) -> int:
        """See io.IOBase."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io.IOBase. Raises OSError for a place before the first byte."""
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if place < 0:
            raise OSError(f"seek to {place}")
        self._at = place
        return place

    def read(self, size: int | None = -1) -> bytes:
        """See io.IOBase."""
        left = max(self._length - self._at, 0)
        self._file.seek(self._start + self._at)
        found = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(found)
        return found

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See io.RawIOBase."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def archive_fault(archive: Path | IO[bytes] | FilePart) -> str | None:
    """What is wrong with an archive, None where every checksum holds. It is read once, in small blocks."""
    try:
        with zipfile.ZipFile(archive) as opened:
            fault = opened.testzip()
    except Exception as error:  # a damaged archive raises whatever its bytes happen to ask for
        return one_line(error) or type(error).__name__
    # torch.serialization.set_crc32_options(False) leaves them out, which looks the same
    return None if fault is None else f"checksum of {one_line(fault)}, unless it was saved without checksums"


def one_line(text: object) -> str:
    """A text of someone else's as part of an error: without line breaks, and not all of it."""
    words = " ".join(str(text).split())
    return words if len(words) <= 160 else f"{words[:160]}..."
