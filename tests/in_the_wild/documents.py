"""Sources of documents for tests, packed and plain, and what is read from them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.report import ReadingOptions, ReadReport
from recycle_ds.data.sources import read_documents

SKIP = ReadingOptions(skip_invalid=True)


def zstd(content: bytes) -> bytes:
    """One frame of zstd."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd,
}  # fmt: skip


def read(source: Path, column: str = "text", options: ReadingOptions | None = None) -> tuple[list[str], ReadReport]:
    """The documents of a source, and the report about it."""
    report = ReadReport()
    return list(read_documents(str(source), column, options=options, report=report)), report


def error_of(source: Path, column: str = "text", options: ReadingOptions | None = None) -> str:
    """The error, of one line, with which a source is refused."""
    with pytest.raises(DataError) as caught:
        read(source, column, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(*texts: str) -> bytes:
    """Documents as lines of a .jsonl file."""
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write(path: Path, content: bytes = b"not a document") -> None:
    """Writes a file, in a new folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
