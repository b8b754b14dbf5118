"""Documents from files, folders and datasets, and the errors if they cannot be read."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.report import ReadingOptions, ReadReport
from recycle_ds.data.sources import read_documents, rows_of

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
LINES = b'{"text": "one"}\n\n{"text": "two\\nlines", "id": 7}\n'


def error_of(source: Path | str, **options: str) -> str:
    """The message of the error raised by reading the complete source."""
    with pytest.raises(DataError) as caught:
        list(read_documents(str(source), **options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_corpus_is_complete_and_clean() -> None:
    """Prevents a corpus that was truncated, re-encoded, or contains remains of the original web page."""
    documents = list(read_documents("shipped"))
    assert len(documents) == 140
    assert 7_900_000 < sum(len(text.encode()) for text in documents) < 8_000_000
    assert documents[0].startswith("Fellow-Citizens of the Senate and House of Representatives:")
    for text in documents:
        assert text == text.strip()
        assert text == unicodedata.normalize("NFC", text)
        for remains in ("\r", "\t", "  ", "\n\n\n", "\n ", " \n", "\ufffd", "\u00a0", "<p", "&amp;"):
            assert remains not in text


@pytest.mark.parametrize("suffix", PACK)
def test_text_and_jsonl_files(tmp_path: Path, suffix: str) -> None:
    """Prevents a compressed file from being read differently from the plain one."""
    pack = PACK[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(LINES))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack("\ufeffwhole\n\nfile".encode()))
    assert list(read_documents(str(tmp_path / f"a.jsonl{suffix}"))) == ["one", "two\nlines"]
    assert list(read_documents(str(tmp_path / f"b.txt{suffix}"))) == ["whole\n\nfile"]


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    """Prevents an order that depends on the file system, and with it the split and the samples."""
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "deep.md").write_text("last")
    (tmp_path / "b.txt").write_text("middle")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "ignored.py").write_text("not a document")
    shares: list[float] = []
    documents = list(read_documents(str(tmp_path), progress=shares.append))
    assert documents == ["one", "two\nlines", "middle", "last"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_parquet(tmp_path: Path) -> None:
    """Prevents rows from being lost between batches of a columnar file."""
    rows = [f"row {number}" for number in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(1000), "body": rows}), tmp_path / "a.parquet")
    assert list(read_documents(str(tmp_path / "a.parquet"), "body")) == rows
    assert "no column 'text'; its columns are: id, body" in error_of(tmp_path / "a.parquet")
    assert "row 1: column 'id' is of type int, not text" in error_of(tmp_path / "a.parquet", text_column="id")
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    assert "cannot read" in error_of(tmp_path / "broken.parquet")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    """Prevents an empty file from being read as an empty corpus."""
    (tmp_path / name).touch()
    assert f"{name} is empty" in error_of(tmp_path / name)


def test_sources_without_documents(tmp_path: Path) -> None:
    """Prevents a token file without tokens, made from a source without text."""
    assert "contains no readable file" in error_of(tmp_path)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    assert "contains no documents" in error_of(tmp_path / "blank.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "a.jsonl:2 is not JSON"),
        (b'["text"]', "a.jsonl:2 is a JSON list, not an object"),
        (b'{"text": 3}', "a.jsonl:2: column 'text' is of type int, not text"),
        (b'{"text": "x\\ud800"}', "a.jsonl:2: column 'text' contains an unpaired surrogate at character 1"),
        (b'{"text": "caf\xe9"}', "a.jsonl is not UTF-8: byte 0xe9 at offset 29"),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    """Prevents an error without the number of the line, in a file of millions of lines."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b"\n")
    assert message in error_of(tmp_path / "a.jsonl")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    """Prevents Latin-1 from being read as replacement characters."""
    (tmp_path / "a.txt").write_bytes("naïve café".encode("latin-1"))
    assert "not UTF-8: byte 0xef at offset 2; convert" in error_of(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_damaged_archive(tmp_path: Path, suffix: str) -> None:
    """Prevents an incomplete download from being read as a shorter corpus."""
    packed = PACK[suffix](LINES * 500)
    for name, content in (("cut", packed[: len(packed) // 2]), ("other", b"plain text")):
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(content)
        assert f"cannot read {path}" in error_of(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder/file", "no local file or folder no/such/folder/file; give"),
        ("./missing", "no local file or folder ./missing; give"),
        ("missing.jsonl.gz", "no local file or folder missing.jsonl.gz; give"),
        ("my_texts", "no local file or folder my_texts; give"),
    ],
)
def test_sources_that_do_not_exist(source: str, message: str) -> None:
    """Prevents a mistyped path from being searched on the hub, and a mistyped name from causing a traceback."""
    assert message in error_of(source)


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a mistyped folder that looks like OWNER/NAME from being retried on the hub for half a minute."""
    asked = []

    def unreachable(*_: object, **options: object) -> None:
        asked.append(options["timeout"])
        raise TimeoutError

    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    started = time.monotonic()
    message = error_of("nobody/nothing:english")
    assert message.startswith(
        "no local file or folder nobody/nothing:english, and it cannot be loaded as a Hugging Face"
    )
    assert asked == [10] and time.monotonic() - started < 5


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    """Prevents a binary file from being tokenised as text."""
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert "has an unsupported file type; give .txt, .md, .jsonl" in error_of(tmp_path / "a.pdf")


def test_datasets_streaming_or_not() -> None:
    """Prevents a stream, whose columns may be unknown, from being read differently from the complete dataset."""
    dataset = datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    unaware = datasets.IterableDataset.from_generator(lambda: iter([{"text": "one"}, {"text": "two"}]))
    for form in (dataset, dataset.to_iterable_dataset(), unaware):
        assert list(rows_of(form, "d", "text")) == ["one", "two"]
        with pytest.raises(DataError, match="has no column 'body'; its columns are"):
            list(rows_of(form, "d", "body"))
    with pytest.raises(DataError, match="d row 1: column 'id' is of type int"):
        list(rows_of(dataset, "d", "id"))
    shares: list[float] = []
    list(rows_of(dataset, "d", "text", shares.append))
    assert shares == [0.5, 1.0]


def test_a_deeply_nested_line(tmp_path: Path) -> None:
    """Prevents a recursion error from a line nested too deeply for the parser."""
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "x"})[:-1] + ', "n": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    )
    assert "a.jsonl:1 is not JSON" in error_of(tmp_path / "a.jsonl")


def test_options_that_have_nothing_to_choose_from(tmp_path: Path) -> None:
    """Prevents --exclude of a single file, and a split of plain files, from being ignored."""
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"--exclude \*\.txt: .*a\.txt is a file; only files of a folder"):
        list(read_documents(str(tmp_path / "a.txt"), options=ReadingOptions(exclude=("*.txt",))))
    assert "has no splits" in error_of(tmp_path / "a.txt", split="test")
    assert "has no splits" in error_of(tmp_path, split="test")


def test_a_fifo_is_not_a_broken_link(tmp_path: Path) -> None:
    """Prevents a search for a link that does not exist, and a reader that waits for ever."""
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "c.txt").symlink_to("nowhere")
    report = ReadReport()
    assert list(read_documents(str(tmp_path), report=report)) == ["text"]
    assert {reason: entry.first for reason, entry in report.left_out.items()} == {
        "neither file nor folder": ["b.txt"],
        "broken links": ["c.txt"],
    }
