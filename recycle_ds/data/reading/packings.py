"""Kinds and compressions of files, recognised by their suffixes in any case."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, cast

TEXT, LINES, ARRAY, PARQUET = "text", "JSON lines", "JSON", "parquet"
"""Kinds of files: one document; a JSON object per line; JSON of any layout; a table."""
_KINDS = {
    ".txt": TEXT, ".md": TEXT, ".jsonl": LINES, ".ndjson": LINES, ".json": ARRAY, ".parquet": PARQUET,
}  # fmt: skip
_PACKINGS = (".gz", ".zst", ".zstd", ".bz2", ".xz")
# Packings that are not read: they make a longer suffix, by which the report names them.
_OTHER_PACKINGS = (".lz4", ".br", ".zip", ".7z", ".snappy", ".lzma", ".lzo")
READABLE = ".txt, .md, .jsonl, .ndjson or .json, each also as .gz, .zst, .bz2 or .xz, or .parquet"
"""All kinds, for messages."""

UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""Errors of a damaged archive, next to those of the disk."""


def split_suffixes(name: str) -> tuple[str, str]:
    """Suffixes of kind and packing in lower case, such as (".jsonl", ".gz") of A.JSONL.GZ; "" if there is none."""
    path = Path(name.lower())
    packing = path.suffix if path.suffix in (*_PACKINGS, *_OTHER_PACKINGS) else ""
    return Path(path.name.removesuffix(packing)).suffix if packing else path.suffix, packing


def kind(name: str) -> str | None:
    """TEXT, LINES, ARRAY or PARQUET; None for a file that is not read."""
    suffix, packing = split_suffixes(name)
    found = _KINDS.get(suffix)
    if packing and (packing not in _PACKINGS or found == PARQUET):
        return None
    return found


class Packed:
    """A file that may be packed. Closes all that it opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = contextlib.ExitStack()
        self._raw: IO[bytes] | None = None

    def __enter__(self) -> Packed:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def open(self) -> IO[bytes]:
        """The unpacked content, from its start. Reading raises one of UNREADABLE if the file is damaged or cut."""
        self._raw = raw = self._opened.enter_context(self._path.open("rb"))
        packing = split_suffixes(self._path.name)[1]
        if packing == ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        if packing == ".bz2":
            return cast(IO[bytes], bz2.BZ2File(raw))
        if packing == ".xz":
            return lzma.LZMAFile(raw)
        if packing in (".zst", ".zstd"):
            import pyarrow  # it brings zstd; Python itself does from 3.14 on

            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
            return cast(IO[bytes], io.BufferedReader(stream, 1 << 20))
        return raw

    def position(self) -> int:
        """Bytes of the packed file read so far; all of them once the file is closed."""
        if self._raw is None or self._raw.closed:
            return self._path.stat().st_size
        return self._raw.tell()
