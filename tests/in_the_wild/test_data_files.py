"""Files of documents as users have them: packings, layouts of JSON, damaged rows, line ends, nested columns."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.report import ReadReport
from recycle_ds.data.sources import read_documents
from tests.in_the_wild.documents import PACK, SKIP, error_of, lines, read, write, zstd


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".JSONL", ".ndjson", ".json", ".txt", ".Md"])
def test_packings_and_suffixes(tmp_path: Path, kind: str, packing: str) -> None:
    """Prevents a packed file, or one with a suffix in capitals, from being left out or read as something else."""
    lower = kind.lower()
    content = b"one" if lower in (".txt", ".md") else b'[{"text": "one"}, {"text": "t\xc3\xb6o"}]'
    if lower in (".jsonl", ".ndjson"):
        content = lines("one", "töo")
    path = tmp_path / f"a{kind}{packing.upper() if kind[1].isupper() else packing}"
    path.write_bytes(PACK[packing](content))
    expected = ["one"] if content == b"one" else ["one", "töo"]
    assert read(path)[0] == read(tmp_path)[0] == expected


def test_a_large_archive_of_several_frames(tmp_path: Path) -> None:
    """Prevents the second frame of an archive that was joined of two, or a large line, from being lost."""
    texts = [f"document {number} " * (200 if number % 7 else 20_000) for number in range(60)]
    for packing, pack in PACK.items():
        half = [lines(*texts[:30]), lines(*texts[30:])]
        (tmp_path / f"a.jsonl{packing}").write_bytes(b"".join(map(pack, half)))
        assert read(tmp_path / f"a.jsonl{packing}")[0] == texts
    array = json.dumps([{"text": text} for text in texts], indent=1).encode()
    (tmp_path / "a.json.zst").write_bytes(zstd(array))
    assert read(tmp_path / "a.json.zst")[0] == texts


@pytest.mark.parametrize("packing", [".gz", ".xz", ".bz2", ".zst"])
def test_a_cut_archive(tmp_path: Path, packing: str) -> None:
    """Prevents an incomplete download from being read as a shorter corpus."""
    packed = PACK[packing](lines(*(str(os.urandom(40)) for _ in range(2000))))
    for name, content in (("cut", packed[: len(packed) // 2]), ("end", packed[:-3]), ("other", b"plain text")):
        path = tmp_path / f"{name}.jsonl{packing}"
        path.write_bytes(content)
        assert f"cannot read {path}" in error_of(path)
    write(tmp_path / "z.jsonl", lines("one"))
    documents, report = read(tmp_path, options=SKIP)
    assert documents[-1] == "one" and report.invalid.count == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        (b'[{"text": "a"},\n {"text": "b"}]\n', ["a", "b"]),
        (b'\xef\xbb\xbf[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        (b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', ["a", "b"]),
        (b'{"text": "a"}{"text": "b"}', ["a", "b"]),
        (b'[{"text": "a"}]\n\xef\xbb\xbf[{"text": "b"}]', ["a", "b"]),
        (b'["a", "b"]', ["a", "b"]),
        (b'[\n]', None),
    ],
)  # fmt: skip
def test_layouts_of_json(tmp_path: Path, content: bytes, expected: list[str] | None) -> None:
    """Prevents a .json file from being read as another number of documents than it has rows."""
    (tmp_path / "a.json").write_bytes(content)
    if expected is None:
        assert "contains no documents" in error_of(tmp_path / "a.json")
    else:
        assert read(tmp_path / "a.json")[0] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"', "a.json row 2 is not JSON"),
        (b'[{"text": "a"}, ', "a.json row 2: the file ends inside an array"),
        (b'[{"text": "a"} {"text": "b"}]', "a.json row 2 is not JSON"),
        (b'{"data": [{"text": "a"}]}', "has no column 'text'; its columns are: data"),
        (b'[1, 2]', "a.json row 1 is a JSON int, not an object"),
        (b'[{"text": "\xff"}]', "not UTF-8: byte 0xff"),
        (b"\xff\xfe[\x00", "not UTF-8"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    """Prevents a cut or foreign .json file from being read as a shorter corpus."""
    (tmp_path / "a.json").write_bytes(content)
    assert message in error_of(tmp_path / "a.json")


def test_the_file_after_a_cut_one(tmp_path: Path) -> None:
    """Prevents a file without the column from counting as rows without text because the file before it was cut."""
    packed = gzip.compress("".join(json.dumps({"text": f"document {n * n}"}) + "\n" for n in range(9999)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl").write_text('{"content": "one"}\n{"content": "two"}\n')
    report = ReadReport()
    with pytest.raises(DataError, match=r"b\.jsonl has no column 'text'; its columns are: content"):
        list(read_documents(str(tmp_path), options=SKIP, report=report))
    assert report.files["a.jsonl.gz"] > 0 and report.invalid.count == 1, "the documents before the cut"


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    """Prevents one null row from stopping the preparation of millions, and rows from being left out silently."""
    write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": null}\n{"id": 3}\nnull\n{"text": ""}\n{"text": "b"}\n')
    documents, report = read(tmp_path / "a.jsonl")
    assert documents == ["a", "", "b"]
    assert (report.without_text.count, report.without_text.first[0]) == (3, f"{tmp_path / 'a.jsonl'}:2")
    table = pyarrow.table({"text": ["a", None, "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    documents, report = read(tmp_path / "a.parquet")
    assert (documents, report.without_text.count) == (["a", "b"], 1)
    write(tmp_path / "b.jsonl", b'{"body": "a"}\n{"body": "b", "id": 1}\n')
    assert "b.jsonl has no column 'text'; its columns are: body; name one" in error_of(tmp_path / "b.jsonl")
    assert "has no column 'text'" in error_of(tmp_path / "b.jsonl", options=SKIP), "a wrong name is no invalid row"


def test_invalid_rows_stop_or_are_counted(tmp_path: Path) -> None:
    """Prevents damaged rows from being left out without the user's wish, and with it from stopping at the first one."""
    rows = [b'{"text": "a"}', b'{"text": 3}', b'{"text": "cut', b"[1]", b'{"text": "x\\ud800"}', b'{"text": "\xe9"}']
    write(tmp_path / "a.jsonl", b"\n".join([*rows, b'{"text": "b"}', b'{"n": ' + b"1" * 5000 + b"}", b'{"text": "c"}']))
    assert "a.jsonl:2: column 'text' is of type int" in error_of(tmp_path / "a.jsonl")
    assert "--skip-invalid" in error_of(tmp_path / "a.jsonl")
    documents, report = read(tmp_path / "a.jsonl", options=SKIP)
    assert documents == ["a", "b", "c"]
    assert report.invalid.count == 6 and report.invalid.first[0].endswith("a.jsonl:2")
    write(tmp_path / "latin.txt", "café".encode("latin-1"))
    write(tmp_path / "utf16.txt", "café".encode("utf-16"))
    assert "it looks like UTF-16" in error_of(tmp_path / "utf16.txt")
    documents, report = read(tmp_path, options=SKIP)
    assert documents == ["a", "b", "c"] and report.invalid.count == 8


def test_joined_files_and_line_ends(tmp_path: Path) -> None:
    """Prevents byte-order marks, CR line ends and missing line ends from stopping a corpus or getting into its text."""
    mark = b"\xef\xbb\xbf"
    write(tmp_path / "a.jsonl", mark + b'{"text": "a"}\r\n' + mark + b'{"text": "b"}' + mark + b'{"text": "c"}\n')
    documents, report = read(tmp_path / "a.jsonl")
    assert (documents, report.byte_order_marks) == (["a", "b", "c"], 2)
    write(tmp_path / "mac.jsonl", b'{"text": "a"}\r{"text": "b"}\r\r{"text": "c"}\r')
    assert read(tmp_path / "mac.jsonl")[0] == ["a", "b", "c"]
    write(tmp_path / "b.txt", mark + b"one\r\ntwo\rthree\n" + mark + b"four")
    documents, report = read(tmp_path / "b.txt")
    assert documents == ["one\ntwo\nthree\nfour"]
    assert (report.byte_order_marks, report.line_ends) == (1, 1)
    assert [line.split(":")[0] for line in report.lines(read=False)] == ["removed", "changed"]


def test_nested_columns(tmp_path: Path) -> None:
    """Prevents a text inside an object from being refused, and a column whose name has a dot from being taken for one."""
    rows = [{"data": {"text": "a", "n": 1}}, {"data": None}, {"data": {"text": "b", "n": 2}}]
    write(tmp_path / "a.jsonl", b"\n".join(json.dumps(row).encode() for row in rows))
    write(tmp_path / "b.jsonl", b'{"data.text": "a", "data": {"text": "wrong"}}\n{"data": {"text": "b"}}')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.jsonl", "b.jsonl", "c.parquet", "saved"):
        assert read(tmp_path / name, "data.text")[0] == ["a", "b"], name
    assert "no column 'data.body'; its columns are: data" in error_of(tmp_path / "a.jsonl", "data.body")
    assert "no column 'date.text'; its columns are: data" in error_of(tmp_path / "c.parquet", "date.text")


def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a value that crosses the end of a chunk, at any place, from being refused or read as another one."""
    texts = ["a", '\\ " ü 😀 \n', "", "b" * 50, "\u00e9" * 9]
    for indent in (None, 1):
        for ascii_only in (True, False):
            content = json.dumps(
                [{"n": -12.5e3, "text": text} for text in texts], indent=indent, ensure_ascii=ascii_only
            )
            (tmp_path / "a.json").write_text(content)
            for chunk in range(1, 40):
                monkeypatch.setattr("recycle_ds.data.reading.json_rows._CHUNK", chunk)
                assert read(tmp_path / "a.json")[0] == texts
