"""Folders of documents as users have them: cloned and saved data sets, and which of their files are read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.report import ReadingOptions
from recycle_ds.data.sources import read_documents
from recycle_ds.data.token_files import open_token_file
from recycle_ds.data.tokenizer import Tokenizer
from tests.in_the_wild.documents import error_of, lines, read, write
from tests.runs import ROOT


def cloned_folder(folder: Path) -> Path:
    """A data set's repository as `git clone` leaves it, with two documents."""
    write(folder / "data" / "train-0.jsonl", lines("one", "two"))
    for name in (
        *("README.md", "LICENSE.txt", "dataset_infos.json", ".gitattributes", ".git/HEAD.txt", ".git/a/b.md"),
        *(
            ".ipynb_checkpoints/train-0-checkpoint.jsonl",
            "data/.train-0.jsonl.swp.txt",
            "__MACOSX/data/._train-0.jsonl",
        ),
    ):
        write(folder / name)
    return folder


def test_a_cloned_data_set_gives_its_documents_only(tmp_path: Path) -> None:
    """Prevents dataset cards, git objects and editors' backups from becoming training documents."""
    documents, report = read(cloned_folder(tmp_path / "set"))
    assert documents == ["one", "two"]
    assert report.files == {"data/train-0.jsonl": 2}
    left_out = {
        reason.partition(" (")[0]: (entry.count, sorted(entry.first)) for reason, entry in report.left_out.items()
    }
    assert left_out["dataset cards and licences"] == (3, ["LICENSE.txt", "README.md", "dataset_infos.json"])
    assert left_out["hidden"][0] == 6
    assert len(left_out) == 2
    write(tmp_path / "set" / "README.md", b"a corpus of read-me files")
    everything = ReadingOptions(all_files=True, exclude=("*.json*", "LICENSE*", ".git/*", "__MACOSX/*", "*.swp.*"))
    assert read(tmp_path / "set", options=everything)[0] == ["a corpus of read-me files"]


def test_evaluation_splits_are_pointed_out(tmp_path: Path) -> None:
    """Prevents training on the test split of a data set's repository without a word about it."""
    for name in ("train-0.jsonl", "test-0.jsonl", "validation/0.jsonl", "contest.jsonl", "latest.txt"):
        write(tmp_path / "data" / name, lines(name))
    (note,) = (line for line in read(tmp_path)[1].lines() if line.startswith("note:"))
    assert "(2), unless --exclude is given: data/test-0.jsonl, data/validation/0.jsonl" in note
    documents, report = read(tmp_path, options=ReadingOptions(exclude=("test-*", "*/validation/*")))
    assert len(documents) == 3 and report.left_out["by --exclude"].count == 2
    assert not [line for line in report.lines() if line.startswith("note:")]


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    """Prevents a part of a corpus from being left out silently because its packing or kind is not known."""
    write(tmp_path / "a.jsonl", lines("one"))
    for name in ("b.jsonl.lz4", "c.csv", "d.tar.gz", "e.parquet.gz", "f.arrow", "Makefile"):
        write(tmp_path / name)
    write(tmp_path / "empty.jsonl", b"")
    outside = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    write(outside / "z.txt", b"linked")
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "linked.txt").symlink_to(outside / "z.txt")
    (tmp_path / "broken.txt").symlink_to(outside / "absent.txt")
    documents, report = read(tmp_path)
    assert documents == ["one", "linked"], "a link to a file is read, as in the hub's cache"
    kinds = {reason.rpartition(", ")[2] for reason in report.left_out if "kind" in reason}
    assert kinds == {".jsonl.lz4", ".csv", ".tar.gz", ".parquet.gz", ".arrow", "no suffix"}
    assert {"empty", "broken links", "links to folders, which are not followed"} <= set(report.left_out)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "linked.txt").unlink()
    assert "contains no readable file (left out: " in error_of(tmp_path) and "c.csv" in error_of(tmp_path)


def test_saved_data_sets(tmp_path: Path) -> None:
    """Prevents a folder of save_to_disk from holding no file, or all its splits from being read as one."""
    one = datasets.Dataset.from_dict({"text": ["a", None, "b"], "id": [1, 2, 3]})
    splits = datasets.DatasetDict({"train": one, "test": datasets.Dataset.from_dict({"text": ["t"]})})
    one.save_to_disk(str(tmp_path / "one"))
    splits.save_to_disk(str(tmp_path / "all" / "inner"))
    write(tmp_path / "all" / "z.jsonl", lines("z"))
    assert read(tmp_path / "one")[0] == ["a", "b"]
    documents, report = read(tmp_path / "all")
    assert documents == ["a", "b", "z"] and report.files == {"inner": 2, "z.jsonl": 1}
    assert report.without_text.count == 1
    assert report.left_out["splits other than 'train'"].first == ["inner/test"]
    assert list(read_documents(str(tmp_path / "all" / "inner"), split="test")) == ["t"]
    with pytest.raises(DataError, match="has no split 'dev'; its splits are: train, test"):
        list(read_documents(str(tmp_path / "all" / "inner"), split="dev"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"cut")
    assert "cannot read the saved data set" in error_of(tmp_path / "one")


def test_the_command_lists_what_it_read_and_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Prevents a preparation of a cloned folder whose user cannot see which files and rows became tokens."""
    folder = cloned_folder(tmp_path / "set")
    write(folder / "data" / "part.csv")
    with (folder / "data" / "train-0.jsonl").open("ab") as stream:
        stream.write(b'{"text": null}\n{"text": " "}\n{broken\n{"text": "three <|endoftext|> four"}\n')
    tokenizer.save(tmp_path / "tokenizer")
    command = [
        sys.executable, str(ROOT / "tools/prepare_data.py"), str(folder), "--output", str(tmp_path / "out"),
        "--tokenizer", str(tmp_path / "tokenizer"), "--validation-fraction", "0", "--workers", "1", "--skip-invalid",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "read: 1 file, 4 documents: data/train-0.jsonl (4)" in done.stdout
    for line in (
        *("left out: 3 files, dataset cards and licences", "left out: 6 files, hidden: "),
        *("left out: 1 file, of a kind that is not read, .csv: data/part.csv", "left out: 1 blank document"),
        *("left out: 1 row without text: ", "left out: 1 invalid row or file: "),
        "special tokens written in 1 document, encoded as text; --parse-special changes that: <|endoftext|> (1)",
    ):
        assert line in done.stdout, line
    assert open_token_file(tmp_path / "out" / "train", tokenizer).documents == 3
