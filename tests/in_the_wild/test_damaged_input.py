"""Random damage to data files, DeepSpeed files and run configurations: the right result, or an error of one line."""

from __future__ import annotations

import gzip
import json
import string
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recycle_ds.config import (
    ConfigError,
    RecycleError,
    load_config,
    load_deepspeed_json,
    resolve_deepspeed,
    save_config,
)
from recycle_ds.config.loading import parse_config
from recycle_ds.data.errors import DataError
from recycle_ds.data.prepare import prepare
from recycle_ds.data.reading.report import ReadingOptions, ReadReport
from recycle_ds.data.sources import read_documents
from recycle_ds.data.token_files import TokenFileWriter, open_token_file
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.batch.prompts import read_prompt_file
from tests.runs import ROOT

TEXTS = ["one", 'two "quoted" \\ é', "", "three\nlines <|endoftext|>", "😀" * 5, "six " * 30]
ROWS = [{"text": text, "id": number, "meta": {"tags": ["a", None], "x": 1.5e3}} for number, text in enumerate(TEXTS)]
RUN = (ROOT / "ds_configs" / "runs" / "demo.yaml").read_text()
DEEPSPEED = (ROOT / "ds_configs" / "deepspeed" / "zero3_offload.json").read_text()
EXAMPLES = settings(max_examples=100)


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
FILES = {
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.parquet": parquet(),
}


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` after some cuts, changed bytes, insertions, repetitions and swaps, as of broken transfers and editors."""
    damaged = content
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(damaged)))
        end = draw(st.integers(start, min(len(damaged), start + 40)))
        part = draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from(
                    [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"}", b"{", b"[", b",", b"null", b":"]
                ),
                st.just(damaged[start:end] * 2),
                st.just(damaged[start:end][::-1]),
            )
        )
        damaged = damaged[:start] if draw(st.integers(0, 9)) == 0 else damaged[:start] + part + damaged[end:]
    return damaged


def is_one_line(error: RecycleError) -> bool:
    return "\n" not in str(error) and len(str(error)) > 10


@pytest.mark.parametrize("name", FILES)
@EXAMPLES
@given(data=st.data())
def test_data_files(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    """Prevents a traceback for a damaged file, and a row that is lost without being counted."""
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data.draw(damages(FILES[name])))
    try:
        documents = list(read_documents(str(path)))
    except DataError as error:
        assert is_one_line(error)
    else:
        assert all(isinstance(text, str) and text.encode("utf-8") is not None for text in documents)
    report = ReadReport()
    try:
        kept = list(read_documents(str(path), options=ReadingOptions(skip_invalid=True), report=report))
    except DataError as error:  # no document is left, or no row has the column
        assert is_one_line(error)
        return
    assert sum(report.files.values()) == len(kept)
    if len(kept) < len(TEXTS):
        fewer = FILES[name] != path.read_bytes()
        assert report.invalid.count + report.without_text.count > 0 or fewer


@EXAMPLES
@given(
    lost=st.sets(st.integers(0, len(ROWS) - 1), max_size=4), broken=st.sets(st.integers(0, len(ROWS) - 1), max_size=3)
)
def test_every_row_is_a_document_or_is_counted(
    tmp_path_factory: pytest.TempPathFactory, lost: set[int], broken: set[int]
) -> None:
    """Prevents rows that are neither read nor reported, whichever of them are null or damaged."""
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    lines = [json.dumps(row | ({"text": None} if number in lost else {})) for number, row in enumerate(ROWS)]
    path.write_text("".join(f"{line[:-1] if n in broken else line}\n" for n, line in enumerate(lines)))
    report = ReadReport()
    expected = [text for number, text in enumerate(TEXTS) if number not in lost | broken]
    if expected:
        documents = list(read_documents(str(path), options=ReadingOptions(skip_invalid=True), report=report))
        assert documents == expected
        assert (report.invalid.count, report.without_text.count) == (len(broken), len(lost - broken))


@settings(max_examples=40)
@given(data=st.data())
def test_nothing_is_written_by_halves(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Prevents token files of a part of a damaged source, and temporary files that are left behind."""
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "a.jsonl").write_bytes(data.draw(damages(LINES)))
    out = folder / "out"
    try:
        report = prepare(str(folder / "a.jsonl"), out, tokenizer, validation_fraction=0, workers=1)
    except DataError as error:
        assert is_one_line(error)
        assert not out.exists() or list(out.iterdir()) == []
        return
    assert sorted(path.name for path in out.iterdir()) == ["train.bin", "train.idx", "train.json"]
    assert open_token_file(out / "train", tokenizer).documents == report.train.documents
    assert report.train.documents + report.blank == sum(report.reading.files.values())


@settings(max_examples=200)
@given(data=st.data())
def test_deepspeed_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Prevents a traceback for a damaged DeepSpeed file, and one that passes here and is refused by DeepSpeed later."""
    from deepspeed.runtime.config import DeepSpeedConfig

    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(data.draw(damages(DEEPSPEED.encode())))
    try:
        load_deepspeed_json(str(path))
        resolved = resolve_deepspeed(load_config(ROOT / "ds_configs/runs/demo.yaml", [f"deepspeed={path}"]), 1)
    except ConfigError as error:
        assert is_one_line(error)
    else:
        DeepSpeedConfig(resolved)


@settings(max_examples=200)
@given(data=st.data())
def test_run_configurations(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Prevents a traceback for a damaged YAML file."""
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(data.draw(damages(RUN.encode())))
    try:
        config = load_config(path)
    except ConfigError as error:
        assert is_one_line(error)
    else:
        assert parse_config(config.model_dump(mode="json")) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


@settings(max_examples=200)
@given(data=st.data(), value=JSON)
def test_values_of_any_kind_in_a_run_configuration(data: st.DataObject, value: Any) -> None:
    """Prevents a traceback for a value of an unexpected kind at any place of the tree, and of an override."""
    tree = yaml.safe_load(RUN)
    *parents, last = data.draw(st.sampled_from([place for place in places(tree) if place]))
    section = tree
    for parent in parents:
        section = section[parent]
    section[last] = value
    overrides = data.draw(
        st.lists(st.text(string.printable, max_size=8).map(lambda text: f"training.steps={text}"), max_size=1)
    )
    try:
        parse_config(tree, overrides)
    except ConfigError as error:
        assert is_one_line(error)


def test_names_with_line_ends(tmp_path: Path) -> None:
    """Prevents an error of several lines because it quotes a key, a column or a file whose name has a line end."""
    (tmp_path / "a\nb.jsonl").write_text('{"bo\\ndy": 1, "\\u001b[31m": 2}\n')
    with pytest.raises(DataError, match=r"a\\nb.jsonl has no column 'text'; its columns are: bo\\ndy, \\x1b\[31m;"):
        list(read_documents(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"training.a\\nb=3: unknown key"):
        parse_config(yaml.safe_load(RUN), ["training.a\nb=3"])


@settings(max_examples=200)
@given(data=st.data())
def test_tokenizer_files(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Prevents a traceback for a damaged tokenizer, and one that encodes text as special tokens."""
    folder = tmp_path_factory.getbasetemp() / "tokenizer"
    tokenizer.save(folder)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(damages(content[:600])) + content[600:])
    try:
        loaded = Tokenizer.load(folder)
        ids = loaded.encode("we the people <|endoftext|>", parse_special=False)
        loaded.encode("we the people <|endoftext|>")
    except DataError as error:
        assert is_one_line(error)
    else:
        assert loaded.eos_id not in ids


@EXAMPLES
@given(data=st.data())
def test_token_files(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Prevents a traceback, or tokens outside the vocabulary, of a damaged token file, index or sidecar."""
    folder = tmp_path_factory.getbasetemp() / "tokens"
    with TokenFileWriter(folder / "train", tokenizer, "texts") as writer:
        for text in filter(None, TEXTS):
            writer.add(tokenizer.encode(text))
    path = folder / data.draw(st.sampled_from(["train.bin", "train.idx", "train.json"]))
    path.write_bytes(data.draw(damages(path.read_bytes())))
    try:
        file = open_token_file(folder / "train", tokenizer)
        tokens, starts = file.read(0, file.tokens)
    except DataError as error:
        assert is_one_line(error)
    else:
        assert tokens.max() < tokenizer.vocab_size and len(starts) <= len(tokens)


def test_prompts_of_joined_files(tmp_path: Path) -> None:
    """Prevents a byte-order mark or CR line ends from stopping a file of prompts."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\xef\xbb\xbf{"prompt": "b"}\r{"prompt": "c"}\n')
    assert [record["prompt"] for record in read_prompt_file(tmp_path / "a.jsonl")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 5000, "not valid YAML"),
        ("a: &a [*a]", "nested too deeply, or a YAML alias contains itself"),
        ("a: " + "1" * 5000, "not valid YAML: Exceeds the limit"),
        ("training: {seed: 010}", "line 1: 010 would be read as octal: write it without leading zeros"),
        ("training: {steps: 1:30}", "training.steps='1:30': must be a whole number"),
    ],
)
def test_surprises_of_yaml(tmp_path: Path, text: str, message: str) -> None:
    """Prevents tracebacks of the parser, and numbers that mean something else than what is written."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml")
    assert message in str(caught.value) and is_one_line(caught.value)


@pytest.mark.parametrize("name", ["2024-02-28", "2024-02-30", "12:30:00", "run-1"])
def test_names_that_yaml_takes_for_dates_and_times(tmp_path: Path, name: str) -> None:
    """Prevents a run whose name is a date from being refused, or from a traceback if there is no such day."""
    (tmp_path / "run.yaml").write_text(RUN.replace("run_dir: runs/demo", f"run_dir: {name}"))
    config = load_config(tmp_path / "run.yaml")
    assert config.run_dir == load_config(tmp_path / "run.yaml", [f"run_dir={name}"]).run_dir == name
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
