"""Rows of parquet files, and of data sets of the `datasets` library: saved to disk or opened from a hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.files import saved_splits
from recycle_ds.data.reading.report import InvalidRow
from recycle_ds.data.reading.rows import Rows, missing_column, outer_column

if TYPE_CHECKING:
    import datasets

_PARQUET_ROWS = 256  # rows per batch: bounds memory for documents of usual length


def read_parquet(path: Path, rows: Rows) -> Iterator[tuple[str | None, int]]:
    """Documents of a parquet file, None for a row without one, each with the share of the file's bytes read so far.

    Raises InvalidRow if it cannot be read, and DataError if it has no such column.
    """
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            outer = outer_column(rows.column, columns)
            if outer is None:
                raise missing_column(str(path), rows.column, columns)
            done, count = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[outer]):
                for value in batch.column(0).to_pylist():
                    done += 1
                    yield rows.document({outer: value}, f"{path} row {done}"), size * done // count
            rows.end_file(str(path))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidRow(f"cannot read {path}: {' '.join(str(error).split())}; is it damaged?") from error


def read_saved(path: Path, split: str, rows: Rows) -> Iterator[tuple[str | None, int]]:
    """Documents of a data set that `save_to_disk` wrote, like `read_parquet`; of one with splits, those of `split`."""
    import datasets

    splits = saved_splits(path)
    if splits and split not in splits:
        raise DataError(f"{path} has no split {split!r}; its splits are: {', '.join(splits)}; name one as --split")
    for other in splits or ():
        if other != split:
            rows.report.leave_out(f"splits other than {split!r}", f"{path.name}/{other}")
    folder = path / split if splits else path
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    try:
        dataset = datasets.load_from_disk(str(folder))
        count = max(1, len(dataset))
        for number, document in enumerate(read_dataset(dataset, str(path), rows), start=1):
            yield document, size * number // count
    except DataError:
        raise
    except Exception as error:  # the library's, pyarrow's, and KeyErrors of damaged descriptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRow(f"cannot read the saved data set {folder}: {reason}; is it complete?") from error


def read_dataset(dataset: datasets.Dataset | datasets.IterableDataset, name: str, rows: Rows) -> Iterator[str | None]:
    """Documents of an open data set, None for a row without one. Raises DataError if it has no such column."""
    if dataset.column_names is not None:  # a stream may not know its columns before its first row
        outer = outer_column(rows.column, dataset.column_names)
        if outer is None:
            raise missing_column(name, rows.column, dataset.column_names)
        dataset = dataset.select_columns([outer])
    for number, row in enumerate(dataset, start=1):
        yield rows.document(row, f"{name} row {number}")
    rows.end_file(name)
