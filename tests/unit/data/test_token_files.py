"""Token files: what is written is read back, and damaged files are rejected."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from recycle_ds.data.errors import DataError
from recycle_ds.data.token_files import TokenFileWriter, open_token_file, read_sidecar, token_dtype
from recycle_ds.data.tokenizer import Tokenizer
from tests.unit.data.conftest import WriteTokens

DOCUMENTS = [[5, 6, 7], [8], [9, 10]]
STREAM = [5, 6, 7, 0, 8, 0, 9, 10, 0]
STARTS = [0, 4, 6]


def test_the_stream_and_its_documents(write_tokens: WriteTokens, tmp_path: Path) -> None:
    """Prevents a missing end-of-document token and document starts that are off by one, at every window."""
    file = write_tokens(tmp_path / "a", DOCUMENTS)
    assert (file.tokens, file.documents) == (9, 3)
    for start in range(10):
        for count in range(10 - start):
            tokens, starts = file.read(start, count)
            assert tokens.tolist() == STREAM[start : start + count]
            assert starts.tolist() == [s - start for s in STARTS if start <= s < start + count]
            assert tokens.dtype == starts.dtype == np.int64
    for start, count in ((-1, 2), (0, 10), (9, 1)):
        with pytest.raises(IndexError):
            file.read(start, count)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), data=st.data())
def test_any_window_of_any_file(
    tmp_path_factory: pytest.TempPathFactory, write_tokens: WriteTokens, lengths: list[int], data: st.DataObject
) -> None:
    """Prevents a window that loses or invents a document boundary."""
    documents = [[1 + (n + i) % 500 for i in range(length)] for n, length in enumerate(lengths)]
    file = write_tokens(tmp_path_factory.mktemp("tokens") / "a", documents)
    stream = [token for ids in documents for token in [*ids, 0]]
    bounds = np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    start = data.draw(st.integers(0, len(stream)))
    count = data.draw(st.integers(0, len(stream) - start))
    tokens, starts = file.read(start, count)
    assert tokens.tolist() == stream[start : start + count]
    assert starts.tolist() == [b - start for b in bounds if start <= b < start + count]


def test_megatron_reads_it(write_tokens: WriteTokens, tmp_path: Path) -> None:
    """Prevents an incompatible format: Megatron's own reader must read the same documents."""
    write_tokens(tmp_path / "a", DOCUMENTS)
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[5, 6, 7, 0], [8, 0], [9, 10, 0]]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset.index.dtype == np.uint16


def test_documents_of_several_sequences(write_tokens: WriteTokens, tmp_path: Path) -> None:
    """Prevents Megatron files that split documents into sentences from being read with a boundary at each sentence."""
    write_tokens(tmp_path / "a", [[5, 6, 7, 0, 8], [9, 10]])
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    builder.add_document(np.array([5, 6, 7, 0, 8, 0], dtype=np.uint16), [4, 2])
    builder.add_document(np.array([9, 10, 0], dtype=np.uint16), [3])
    builder.finalize(str(tmp_path / "a.idx"))
    tokens, starts = open_token_file(tmp_path / "a", None).read(0, 9)
    assert tokens.tolist() == STREAM
    assert starts.tolist() == [0, 6]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (65_536, np.uint16), (65_537, np.int32)])
def test_the_smallest_dtype_for_the_vocabulary(vocab_size: int, dtype: type) -> None:
    """Prevents ids that overflow, and files of twice the necessary size."""
    assert token_dtype(vocab_size) is dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_the_sidecar_describes_the_content(write_tokens: WriteTokens, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prevents a file whose tokenizer, size or source is unknown."""
    write_tokens(tmp_path / "a", DOCUMENTS)
    sidecar = read_sidecar(tmp_path / "a")
    assert (sidecar.tokens, sidecar.documents, sidecar.vocab_size, sidecar.eos_id) == (9, 3, 600, tokenizer.eos_id)
    assert sidecar.tokenizer_fingerprint == tokenizer.fingerprint
    assert sidecar.bin_bytes == (tmp_path / "a.bin").stat().st_size == 18
    assert sidecar.idx_bytes == (tmp_path / "a.idx").stat().st_size
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def cut(file: Path, count: int) -> None:
    """Removes the last bytes of a file."""
    os.truncate(file, file.stat().st_size - count)


def poke(file: Path, offset: int, content: bytes) -> None:
    """Overwrites bytes of a file."""
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def edit(file: Path, **changes: object) -> None:
    """Changes entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: Path(f"{a}.bin").unlink(), "no such token file: .*a.bin"),
        (lambda a: Path(f"{a}.idx").unlink(), "no such token file: .*a.idx"),
        (lambda a: Path(f"{a}.json").unlink(), "no such token file: .*a.json"),
        (lambda a: poke(Path(f"{a}.idx"), 0, b"NOTINDEX"), "a.idx is not a Megatron index"),
        (lambda a: os.truncate(f"{a}.idx", 5), "a.idx is not a Megatron index"),
        (lambda a: os.truncate(f"{a}.idx", 20), "a.idx is truncated: 20 bytes, its header alone has 34"),
        (lambda a: cut(Path(f"{a}.idx"), 8), "a.idx is truncated: .* its header specifies"),
        (lambda a: poke(Path(f"{a}.idx"), 9, struct.pack("<Q", 7)), "index version 7"),
        (lambda a: poke(Path(f"{a}.idx"), 17, b"\x63"), "dtype code 99"),
        (lambda a: cut(Path(f"{a}.bin"), 2), "a.bin has 16 bytes, its index describes 18"),
        (lambda a: os.truncate(f"{a}.bin", 0), "a.bin contains no tokens"),
        (lambda a: Path(f"{a}.json").write_text("{"), "cannot read .*a.json"),
        (lambda a: Path(f"{a}.json").write_text("[]"), "a.json has format_version None"),
        (lambda a: edit(Path(f"{a}.json"), format_version=99), "a.json has format_version 99, this code reads 1"),
        (lambda a: edit(Path(f"{a}.json"), tokens="many"), "tokens must be of type int, not 'many'"),
        (
            lambda a: edit(Path(f"{a}.json"), tokens=8),
            "records 8 tokens in 3 documents, the pair beside it has 9 in 3",
        ),
        (lambda a: edit(Path(f"{a}.json"), tokenizer_fingerprint="0" * 64), "made with another tokenizer"),
        (lambda a: edit(Path(f"{a}.json"), vocab_size=601), "has a vocabulary of 601"),
        (lambda a: edit(Path(f"{a}.json"), eos_id=1), "ends documents with token 1"),
    ],
)
def test_damage_is_reported_when_opening(
    write_tokens: WriteTokens, tokenizer: Tokenizer, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """Prevents training on invalid data, or a crash at a random step, from a damaged or mismatched file."""
    write_tokens(tmp_path / "a", DOCUMENTS)
    damage(tmp_path / "a")
    with pytest.raises(DataError, match=message) as caught:
        open_token_file(tmp_path / "a", tokenizer)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_accepts_any_file(write_tokens: WriteTokens, tmp_path: Path) -> None:
    """Prevents inspection of a file from needing the tokenizer that made it."""
    write_tokens(tmp_path / "a", DOCUMENTS)
    edit(tmp_path / "a.json", tokenizer_fingerprint="0" * 64)
    assert open_token_file(tmp_path / "a", None).tokens == 9


def test_tokens_outside_the_vocabulary(write_tokens: WriteTokens, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prevents an index error inside the embedding, far from its cause, if a file of the right size has wrong bytes."""
    write_tokens(tmp_path / "a", DOCUMENTS)
    poke(tmp_path / "a.bin", 2, struct.pack("<H", 60_000))
    file = open_token_file(tmp_path / "a", tokenizer)
    assert file.read(2, 3)[0].tolist() == STREAM[2:5]
    with pytest.raises(
        DataError, match=r"a.bin is damaged: it contains tokens from 5 to 60000, its vocabulary has 600"
    ):
        file.read(0, 3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_keeps_existing_files(
    write_tokens: WriteTokens, tokenizer: Tokenizer, tmp_path: Path, error: type[BaseException]
) -> None:
    """Prevents half-written files, and the loss of a valid file to a rewrite that failed."""
    write_tokens(tmp_path / "a", DOCUMENTS)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(error), TokenFileWriter(tmp_path / "a", tokenizer, "ids") as writer:
        writer.add([1, 2, 3])
        raise error
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["a.bin", "a.idx", "a.json"])
def test_a_failed_publication_leaves_no_files(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    """Prevents half of a pair, and a misleading error, if one of its files cannot be renamed into place."""
    with pytest.raises(IsADirectoryError), TokenFileWriter(tmp_path / "a", tokenizer, "ids") as writer:
        writer.add([1, 2, 3])
        (tmp_path / name).mkdir()
    assert [file.name for file in tmp_path.iterdir()] == [name]
