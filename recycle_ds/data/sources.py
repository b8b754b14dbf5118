"""Documents of a corpus, one string each: local files and folders, the shipped corpus, Hugging Face datasets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading import json_rows, packings
from recycle_ds.data.reading.files import files_of, is_hidden, saved_splits
from recycle_ds.data.reading.report import InvalidRow, ReadingOptions, ReadReport
from recycle_ds.data.reading.rows import Rows
from recycle_ds.data.reading.tables import read_dataset, read_parquet, read_saved

if TYPE_CHECKING:
    import datasets

    from recycle_ds.data.reading.chat import ChatTemplate

SHIPPED = "shipped"
"""Name of the corpus inside the package."""
TRAIN_SPLIT = "train"
"""The split that is read if none is named."""
Progress = Callable[[float], None]
"""Called periodically with the fraction of the source read so far, 0 to 1."""

_CORPUS = Path(__file__).parent / "corpus" / "presidential_addresses_1790_1928.jsonl.xz"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_HUB_SECONDS = 10  # wait for the hub's first answer


def read_documents(
    source: str,
    text_column: str = "text",
    *,
    chat: ChatTemplate | None = None,
    streaming: bool = False,
    split: str = TRAIN_SPLIT,
    options: ReadingOptions | None = None,
    report: ReadReport | None = None,
    progress: Progress | None = None,
) -> Iterator[str]:
    """Yield the documents of a source in a fixed order, with only a few in memory at once.

    Args:
        source: `shipped`; a .txt or .md file (one document, its line ends become LF); a .jsonl, .ndjson, .json or .parquet
            file (one document per row); all but parquet also packed as .gz, .zst, .bz2 or .xz; a folder that
            `Dataset.save_to_disk` wrote; a folder of all these, read recursively in sorted order without hidden files and
            dataset cards; or a Hugging Face dataset, `owner/name` or `owner/name:configuration`.
        text_column: column that contains the text; `data.text` also inside an object.
        chat: renders the column, which then contains lists of messages.
        streaming: read a Hugging Face dataset while it downloads, without keeping it.
        split: split of a Hugging Face dataset.
        options: which files and rows are left out.
        report: filled with what is read and what is left out.
        progress: called with the fraction read; never called for a stream, whose length is unknown.

    Raises:
        DataError: the source does not exist, contains no documents, or cannot be read; the message names the place.
    """
    options, report = options or ReadingOptions(), report if report is not None else ReadReport()
    rows = Rows(text_column, chat, options.skip_invalid, report)
    path = _CORPUS if source == SHIPPED else Path(source).expanduser()
    if path.exists():
        documents = _read_local(path, split, options, rows, progress)
    elif _looks_local(source):
        raise DataError(
            f"no local file or folder {source}; give a file ({packings.READABLE}), a folder, '{SHIPPED}', or a Hugging Face "
            "dataset as OWNER/NAME"
        )
    else:
        documents = _read_hub(source, split, streaming, rows, progress)
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        left_out = "; ".join(report.row_lines())
        raise DataError(f"{source} contains no documents{left_out and f' ({left_out})'}; give a source with text")


def check_outside(source: str, output: Path) -> None:
    """Raises DataError if files made in `output` would be read as documents of `source` the next time."""
    folder = Path(source).expanduser()
    if source == SHIPPED or not folder.is_dir() or saved_splits(folder) is not None:
        return
    inside, place = folder.resolve(), output.expanduser().resolve()
    if place.is_relative_to(inside) and not any(is_hidden(part) for part in place.relative_to(inside).parts):
        raise DataError(
            f"--output {output}: is in the source {source}, whose files are read as documents; name a folder outside it"
        )


def _looks_local(source: str) -> bool:
    return packings.kind(source) is not None or _HUB_NAME.fullmatch(source) is None


def _read_local(
    path: Path, split: str, options: ReadingOptions, rows: Rows, progress: Progress | None
) -> Iterator[str]:
    saved = path.is_dir() and saved_splits(path) is not None
    files = [path] if path.is_file() or saved else files_of(path, options, rows.report)
    if path.is_file() and packings.kind(path.name) is None:
        raise DataError(f"{path} has an unsupported file type; give {packings.READABLE}")
    if path.is_file() and options.exclude:
        raise DataError(f"--exclude {options.exclude[0]}: {path} is a file; only files of a folder can be left out")
    if split != TRAIN_SPLIT and not any(file.is_dir() for file in files):
        raise DataError(
            f"split {split!r}: {path} has no splits; only Hugging Face datasets and folders that save_to_disk wrote have"
        )
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{path} is empty; remove it or fill it")
    sizes = [file.stat().st_size for file in files]
    total = sum(sizes) or 1
    before = 0
    for file, size in zip(files, sizes, strict=True):
        name = file.name if file == path else file.relative_to(path).as_posix()
        rows.report.files[name] = 0
        rows.start_file()
        try:
            for document, offset in _read_file(file, split, rows):
                if document is None:
                    continue
                rows.report.files[name] += 1
                yield document
                if progress is not None:
                    progress(min(1.0, (before + offset) / total))
        except InvalidRow as error:  # an unreadable file, or what is left of it
            rows.invalid(error, f"{file} (from where it cannot be read)")
        before += size


def _read_file(path: Path, split: str, rows: Rows) -> Iterator[tuple[str | None, int]]:
    """Documents of one file, None for a row without one, each with the number of bytes of the file on disk read so far."""
    if path.is_dir():
        yield from read_saved(path, split, rows)
        return
    kind = packings.kind(path.name)
    if kind == packings.PARQUET:
        yield from read_parquet(path, rows)
        return
    try:
        with packings.Packed(path) as packed:
            if kind == packings.TEXT:
                yield _read_text(path, packed.open(), rows), packed.position()
                return
            read = json_rows.read_array if kind == packings.ARRAY else json_rows.read_lines
            for document in read(path, packed, rows):
                yield document, packed.position()
    except packings.UNREADABLE as error:
        raise InvalidRow(f"cannot read {path}: {error}; is it damaged?") from error


def _read_text(path: Path, stream: IO[bytes], rows: Rows) -> str:
    """A whole text file as one document, without byte-order marks and with LF as line ends."""
    text = json_rows.decode(stream.read(), path, 0).removeprefix(json_rows.MARK)
    rows.report.byte_order_marks += text.count(json_rows.MARK)
    rows.report.line_ends += "\r" in text
    return text.replace(json_rows.MARK, "").replace("\r\n", "\n").replace("\r", "\n")


def _read_hub(source: str, split: str, streaming: bool, rows: Rows, progress: Progress | None) -> Iterator[str]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        _use_cache_if_unreachable(name)
        dataset = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
        for document in _documents(dataset, source, rows, progress):
            rows.report.files[source] = rows.report.files.get(source, 0) + 1
            yield document
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
    """Documents of an open Hugging Face dataset, streaming or not; rows without text have none.

    Args:
        dataset: one split.
        name: its name in error messages.
        text_column: column that contains the text.
        progress: as in `read_documents`.

    Raises:
        DataError: the column is missing or does not contain text.
    """
    return _documents(dataset, name, Rows(text_column, None, False, ReadReport()), progress)


def _documents(
    dataset: datasets.Dataset | datasets.IterableDataset, name: str, rows: Rows, progress: Progress | None
) -> Iterator[str]:
    total = None if not hasattr(dataset, "num_rows") else dataset.num_rows
    for number, document in enumerate(read_dataset(dataset, name, rows), start=1):
        if document is not None:
            yield document
        if progress is not None and total:
            progress(number / total)
