"""Documents of a corpus, one string each: local files and folders, the shipped corpus, Hugging Face datasets."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from recycle_ds.data.errors import DataError

if TYPE_CHECKING:
    import datasets

SHIPPED = "shipped"
"""Name of the corpus inside the package."""
Progress = Callable[[float], None]
"""Called periodically with the fraction of the source read so far, 0 to 1."""

_CORPUS = Path(__file__).parent / "corpus" / "presidential_addresses_1790_1928.jsonl.xz"
_TEXT = (".txt", ".md")
_KINDS = (*_TEXT, ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".xz")
_COMPRESSED_SUFFIXES = tuple(kind + compression for kind in (*_TEXT, ".jsonl") for compression in _COMPRESSED)
_READABLE = f"{', '.join(_KINDS)}, all but the last also as .gz or .xz"
_PARQUET_ROWS = 256  # rows per batch: bounds memory for documents of usual length
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_HUB_SECONDS = 10  # wait for the hub's first answer


def read_documents(
    source: str,
    text_column: str = "text",
    *,
    streaming: bool = False,
    split: str = "train",
    progress: Progress | None = None,
) -> Iterator[str]:
    """Yield the documents of a source in a fixed order, with only a few in memory at once.

    Args:
        source: `shipped`; a .txt or .md file (one document); a .jsonl or .parquet file (one per row); a folder of them,
            read recursively in sorted order; or a Hugging Face dataset, `owner/name` or `owner/name:configuration`.
        text_column: column that contains the text.
        streaming: read a Hugging Face dataset while it downloads, without keeping it.
        split: split of a Hugging Face dataset.
        progress: called with the fraction read; never called for a stream, whose length is unknown.

    Raises:
        DataError: the source does not exist, contains no documents, or cannot be read; the message names the place.
    """
    path = _CORPUS if source == SHIPPED else Path(source).expanduser()
    if path.exists():
        documents = _read_local(path, text_column, progress)
    elif _looks_local(source):
        raise DataError(
            f"no local file or folder {source}; give a file ({_READABLE}), a folder, '{SHIPPED}', or a Hugging Face dataset as "
            "OWNER/NAME"
        )
    else:
        documents = _read_hub(source, text_column, split, streaming, progress)
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise DataError(f"{source} contains no documents; give a source with text")


def _looks_local(source: str) -> bool:
    return source.endswith(_KINDS + _COMPRESSED_SUFFIXES) or _HUB_NAME.fullmatch(source) is None


def _read_local(path: Path, text_column: str, progress: Progress | None) -> Iterator[str]:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and _is_readable(f))
    if path.is_file() and not _is_readable(path):
        raise DataError(f"{path} has an unsupported file type; give {_READABLE}")
    if not files:
        raise DataError(f"the folder {path} contains no readable file; give {_READABLE}")
    sizes = [file.stat().st_size for file in files]
    total = sum(sizes) or 1
    for number, file in enumerate(files):
        before = sum(sizes[:number]) if progress is not None else 0
        for document, offset in _read_file(file, text_column):
            yield document
            if progress is not None:
                progress((before + offset) / total)


def _is_readable(path: Path) -> bool:
    return path.name.endswith(_KINDS + _COMPRESSED_SUFFIXES)


def _read_file(path: Path, text_column: str) -> Iterator[tuple[str, int]]:
    """Documents of one file, each with the number of bytes of the file on disk read so far."""
    if not path.stat().st_size:
        raise DataError(f"{path} is empty; remove it or fill it")
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path, text_column)
        return
    try:
        with open(path, "rb") as raw, _decompressed(path, raw) as stream:
            if ".jsonl" in path.suffixes:
                yield from _read_jsonl(path, raw, stream, text_column)
            else:
                yield _decode(stream.read(), path, 0), raw.tell()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; is it damaged?") from error


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return lzma.LZMAFile(raw) if path.suffix == ".xz" else raw


def _decode(content: bytes, path: Path, offset: int) -> str:
    """Decode `content`, which starts at byte `offset` of the decompressed file, without a byte-order mark."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start}; "
            "convert it to UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _read_jsonl(path: Path, raw: IO[bytes], stream: IO[bytes], text_column: str) -> Iterator[tuple[str, int]]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        text = _decode(line, path, offset)
        offset += len(line)
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}; put one JSON object on each line") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} is a JSON {type(row).__name__}, not an object; put one JSON object on each line")
        if text_column not in row:
            raise _missing_column(where, text_column, list(row))
        yield _checked(row[text_column], where, text_column), raw.tell()


def _read_parquet(path: Path, text_column: str) -> Iterator[tuple[str, int]]:
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_column not in file.schema_arrow.names:
                raise _missing_column(str(path), text_column, file.schema_arrow.names)
            done, rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_column]):
                for value in batch.column(0).to_pylist():
                    done += 1
                    yield _checked(value, f"{path} row {done}", text_column), size * done // rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}; is it damaged?") from error


def _read_hub(source: str, text_column: str, split: str, streaming: bool, progress: Progress | None) -> Iterator[str]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        _use_cache_if_unreachable(name)
        dataset = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
        yield from rows_of(dataset, source, text_column, progress)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"no local file or folder {source}, and it cannot be loaded as a Hugging Face dataset, split {split!r}: {reason}; "
            "without access to a hub, download it elsewhere as parquet or jsonl files and give their folder"
        ) from error


def _use_cache_if_unreachable(name: str) -> None:
    """Asks the hub once; if it does not answer, only cached datasets are used, instead of half a minute of retries."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except HfHubHTTPError:  # an answer, which load_dataset explains
        return
    except Exception:  # the errors of whichever HTTP client the library uses
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def rows_of(
    dataset: datasets.Dataset | datasets.IterableDataset, name: str, text_column: str, progress: Progress | None = None
) -> Iterator[str]:
    """Documents of an open Hugging Face dataset, streaming or not.

    Args:
        dataset: one split.
        name: its name in error messages.
        text_column: column that contains the text.
        progress: as in `read_documents`.

    Raises:
        DataError: the column is missing or does not contain text.
    """
    if dataset.column_names is not None:  # a stream may not know its columns before its first row
        if text_column not in dataset.column_names:
            raise _missing_column(name, text_column, dataset.column_names)
        dataset = dataset.select_columns([text_column])
    rows = None if not hasattr(dataset, "num_rows") else dataset.num_rows
    for number, row in enumerate(dataset, start=1):
        if text_column not in row:
            raise _missing_column(f"{name} row {number}", text_column, list(row))
        yield _checked(row[text_column], f"{name} row {number}", text_column)
        if progress is not None and rows:
            progress(number / rows)


def _missing_column(where: str, text_column: str, columns: list[str]) -> DataError:
    found = ", ".join(map(str, columns)) or "none"
    return DataError(f"{where} has no column {text_column!r}; its columns are: {found}; name one as the text column")


def _checked(value: Any, where: str, text_column: str) -> str:
    if not isinstance(value, str):
        kind = "empty (null)" if value is None else f"of type {type(value).__name__}"
        raise DataError(f"{where}: column {text_column!r} is {kind}, not text; name another column or drop the row")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can encode an unpaired surrogate, UTF-8 cannot
            raise DataError(
                f"{where}: column {text_column!r} contains an unpaired surrogate at character {error.start}; "
                "repair the text"
            ) from error
    return value
