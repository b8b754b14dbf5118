"""From documents to token files: parallel, reproducible, and without leftover files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from recycle_ds.config.schema import DataConfig, PrepareConfig, TokenSource
from recycle_ds.data.errors import DataError
from recycle_ds.data.prepare import is_validation, prepare, prepare_if_missing, vocabulary_size
from recycle_ds.data.sources import read_documents
from recycle_ds.data.token_files import open_token_file, read_sidecar
from recycle_ds.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
Write = Callable[[Sequence[str]], str]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder; none if it does not exist, since `prepare` creates it with the first document."""
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool as from a shell."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_the_files_do_not_depend_on_the_workers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prevents an order of documents, or a split, that depends on which process was faster."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(read_documents("shipped")):
        if number % 5 == 0:  # several chunks for each worker
            (corpus / f"{number:03}.txt").write_text(text)
    one = prepare(str(corpus), tmp_path / "out", tokenizer, validation_fraction=0.2, workers=1, seed=4)
    made = contents(tmp_path / "out")
    three = prepare(str(corpus), tmp_path / "out", tokenizer, validation_fraction=0.2, workers=3, seed=4)
    assert contents(tmp_path / "out") == made
    assert one == three
    assert one.validation is not None
    assert one.train.documents + one.validation.documents == 28
    for part in (one.train, one.validation):
        assert (open_token_file(part.prefix, tokenizer).tokens, read_sidecar(part.prefix).documents) == (
            part.tokens,
            part.documents,
        )


def test_documents_are_restored_from_the_token_files(tokenizer: Tokenizer, tmp_path: Path, jsonl: Write) -> None:
    """Prevents lost, duplicated or reordered documents: decoding the files restores the corpus."""
    documents = [f"document {n}: café\n\n{'word ' * (n % 7)}" for n in range(50)]
    report = prepare(jsonl([*documents, "", " \n"]), tmp_path / "out", tokenizer, validation_fraction=0.3, workers=1)
    assert report.blank == 2
    assert report.validation is not None
    sides: list[list[str]] = []
    for part in (report.train, report.validation):
        tokens, starts = open_token_file(part.prefix, tokenizer).read(0, part.tokens)
        ends = [*starts[1:], part.tokens]
        assert all(tokens[end - 1] == tokenizer.eos_id for end in ends)
        sides.append([tokenizer.decode(tokens[a : b - 1].tolist()) for a, b in zip(starts, ends, strict=True)])
    assert sides[0] == [text for n, text in enumerate(documents) if not is_validation(n, 0.3, 0)]
    assert sides[1] == [text for n, text in enumerate(documents) if is_validation(n, 0.3, 0)]


@given(fraction=st.floats(0, 1, exclude_min=True), seed=st.integers(0, 2**32))
def test_both_sides_have_a_document(fraction: float, seed: int) -> None:
    """Prevents an empty validation or training file of a corpus of few documents."""
    assert {is_validation(0, fraction, seed), is_validation(1, fraction, seed)} == {False, True}


def test_the_split_follows_fraction_and_seed() -> None:
    """Prevents a held-out fraction other than the requested one, and a split that ignores the seed."""
    chosen = [[is_validation(n, 0.1, seed) for n in range(5000)] for seed in (0, 1)]
    assert all(400 < sum(side) < 600 for side in chosen)
    assert chosen[0] != chosen[1]
    assert not any(is_validation(n, 0.0, 0) for n in range(100))


def test_no_validation(tokenizer: Tokenizer, tmp_path: Path, jsonl: Write) -> None:
    """Prevents refusing a single document if no validation split was requested."""
    report = prepare(jsonl(["all there is"]), tmp_path / "out", tokenizer, validation_fraction=0, workers=1)
    assert report.validation is None
    assert sorted(contents(tmp_path / "out")) == ["train.bin", "train.idx", "train.json"]


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        (["only one"], {}, "single document, which cannot be split"),
        (["", "  "], {}, "holds only blank documents"),
        (["a", "b"], {"validation_fraction": 1.5}, "validation fraction is 1.5; it must be from 0 to below 1"),
        (["a", "b"], {"validation_fraction": 1.0}, "validation fraction is 1.0; it must be from 0 to below 1"),
        (["a", "b"], {"workers": 0}, "workers is 0; at least 1"),
        (["a", "b"], {"text_column": "body"}, "no column 'body'"),
    ],
)
def test_corpora_that_cannot_be_prepared(
    tokenizer: Tokenizer, tmp_path: Path, jsonl: Write, documents: list[str], options: dict[str, object], message: str
) -> None:
    """Prevents incomplete output of a corpus that is refused."""
    with pytest.raises(DataError, match=message):
        prepare(jsonl(documents), tmp_path / "out", tokenizer, **{"workers": 1, **options})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}


def test_an_error_late_in_the_source_keeps_existing_files(tokenizer: Tokenizer, tmp_path: Path, jsonl: Write) -> None:
    """Prevents overwriting a valid token file with the documents before an invalid line."""
    source = jsonl(["a document of a few words"] * 200)
    prepare(source, tmp_path / "out", tokenizer, workers=1)
    before = contents(tmp_path / "out")
    with open(source, "a") as stream:
        stream.write("{broken\n")
    with pytest.raises(DataError, match=r"documents.jsonl:201 is not JSON"):
        prepare(source, tmp_path / "out", tokenizer, workers=2)
    assert contents(tmp_path / "out") == before


def test_an_error_in_a_worker_reaches_the_user(tmp_path: Path, jsonl: Write) -> None:
    """Prevents a pool that hangs, or exits without an error, if a text cannot be encoded."""
    built = tokenizers.Tokenizer(models.WordLevel(vocab={"known": 0, "</s>": 1}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match=r"cannot encode a text: .*UNK"):
        prepare(jsonl(["known"] * 3000 + ["unknown"]), tmp_path / "out", Tokenizer(built.to_str()), workers=2)
    assert contents(tmp_path / "out") == {}


@pytest.fixture
def config(tmp_path: Path, jsonl: Write, texts: list[str]) -> DataConfig:
    """A configuration whose data do not exist yet, with the settings to prepare them."""
    out = tmp_path / "data"
    return DataConfig(
        train=(TokenSource(path=str(out / "train")),),
        validation=(TokenSource(path=str(out / "validation")),),
        tokenizer=str(out / "tokenizer.json"),
        prepare=PrepareConfig(source=jsonl(texts), output=str(out), tokenizer_vocab=400, validation_fraction=0.1),
    )


def test_missing_data_are_prepared_once(config: DataConfig, tmp_path: Path) -> None:
    """Prevents a first run that fails without data, and a second run that prepares them again."""
    before = vocabulary_size(config)
    report = prepare_if_missing(config, workers=1)
    assert report is not None
    tokenizer = Tokenizer.load(config.tokenizer)
    assert tokenizer.vocab_size == 400 == before
    made = contents(tmp_path / "data")
    for source in (*config.train, *config.validation):
        assert open_token_file(source.path, tokenizer).tokens > 0
    assert prepare_if_missing(config, workers=1) is None
    (tmp_path / "data" / "validation.idx").unlink()
    assert prepare_if_missing(config, workers=1) == report
    assert contents(tmp_path / "data") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "shipped"}, "was made with source '.*documents.jsonl', data.prepare.source is 'shipped'"),
        ({"validation_fraction": 0.2}, "validation_fraction 0.1, data.prepare.validation_fraction is 0.2"),
        ({"parse_special": True}, "made with parse_special False, data.prepare.parse_special is True"),
        ({"exclude": ("b*",)}, "made with exclude .*, data.prepare.exclude is"),
        ({"tokenizer_vocab": 401}, "has 400 tokens, data.prepare.tokenizer_vocab is 401"),
    ],
)
def test_data_that_were_made_with_other_settings(config: DataConfig, change: dict[str, object], message: str) -> None:
    """Prevents a changed data.prepare from being ignored because files of an older one exist."""
    prepare_if_missing(config, workers=1)
    assert config.prepare is not None
    changed = config.model_copy(update={"prepare": config.prepare.model_copy(update=change)})
    with pytest.raises(DataError, match=message):
        prepare_if_missing(changed, workers=1)


def test_the_vocabulary_is_that_of_the_tokenizer_in_use(
    config: DataConfig, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Prevents a model with the vocabulary that data.prepare names if the tokenizer is another file, or exists already."""
    tokenizer.save(tmp_path / "data")
    assert vocabulary_size(config) == tokenizer.vocab_size != 400
    assert vocabulary_size(config.model_copy(update={"tokenizer": str(tmp_path / "data")})) == tokenizer.vocab_size
    with pytest.raises(DataError, match=r"no such tokenizer: .*other/tokenizer\.json"):
        vocabulary_size(config.model_copy(update={"tokenizer": str(tmp_path / "other" / "tokenizer.json")}))


def test_missing_data_without_settings_to_prepare_them(
    config: DataConfig, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Prevents an error without the missing file or the command that creates it, or with one that needs this very file."""
    plain = config.model_copy(update={"prepare": None})
    with pytest.raises(DataError, match=r"no such file: .*tokenizer.json; make it with `recycle-ds tokenizer"):
        prepare_if_missing(plain)
    other = plain.model_copy(update={"tokenizer": str(tmp_path / "nope.json")})
    with pytest.raises(
        DataError, match=r"nope.json; make it with `recycle-ds tokenizer .*data.tokenizer=.*/tokenizer.json"
    ):
        prepare_if_missing(other)
    tokenizer.save(tmp_path / "data")
    with pytest.raises(DataError, match=r"no such file: .*train.bin; make it with `recycle-ds prepare SOURCE"):
        prepare_if_missing(plain)
    elsewhere = config.model_copy(update={"train": (TokenSource(path=str(tmp_path / "other" / "train")),)})
    with pytest.raises(DataError, match=r"no such file: .*other/train.bin; data.prepare makes only"):
        prepare_if_missing(elsewhere)


def test_the_tools_from_end_to_end(tmp_path: Path, jsonl: Write, texts: list[str]) -> None:
    """Prevents tools whose options do not reach the package, and errors that print a traceback."""
    source, out = jsonl(texts), tmp_path / "out"
    trained = run_tool("train_tokenizer.py", source, "--output", str(out), "--vocab-size", "300")
    assert trained.returncode == 0, trained.stderr
    options = ("--output", str(out), "--tokenizer", str(out), "--validation-fraction", "0.25", "--workers", "1")
    prepared = run_tool("prepare_data.py", source, *options)
    assert prepared.returncode == 0, prepared.stderr
    assert prepared.stderr == ""
    assert f"{read_sidecar(out / 'train').tokens:,}" in prepared.stdout
    assert read_sidecar(out / "validation").recipe["validation_fraction"] == 0.25
    for name, arguments in (
        ("prepare_data.py", ("missing.txt", *options, "--overwrite")),
        ("train_tokenizer.py", (source, "--output", str(out), "--vocab-size", "100000", "--overwrite")),
    ):
        before = contents(out)
        kept = run_tool(name, *arguments[:-1])
        assert kept.returncode == 2 and "already exists: name another --output, or replace" in kept.stderr
        failed = run_tool(name, *arguments)
        assert failed.returncode == 2 and "already exists" not in failed.stderr and contents(out) == before
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    validation = (out / "validation.bin").read_bytes()
    alone = run_tool("prepare_data.py", source, *options, "--validation-fraction", "0", "--overwrite")
    assert alone.returncode == 0, alone.stderr
    assert f"note: {out / 'validation.bin'} is older and was kept" in alone.stdout
    assert (out / "validation.bin").read_bytes() == validation


@pytest.mark.parametrize("place", [".", "inner/tokens"])
def test_files_are_not_made_in_their_source(tokenizer: Tokenizer, tmp_path: Path, place: str) -> None:
    """Prevents tokenizer.json and train.json from being read as documents of the folder, or as damaged ones."""
    (tmp_path / "a.txt").write_text("words")
    output = tmp_path / place
    with pytest.raises(DataError, match=r"is in the source .*; name a folder outside it"):
        prepare(str(tmp_path), output, tokenizer, validation_fraction=0, workers=1)
    done = run_tool("train_tokenizer.py", str(tmp_path), "--output", str(output), "--vocab-size", "300")
    assert done.returncode == 2 and "is in the source" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    prepare(str(tmp_path), tmp_path / ".tokens", tokenizer, validation_fraction=0, workers=1)  # hidden: it is not read


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_files(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Write, number: signal.Signals, code: int
) -> None:
    """Prevents half-written files, orphaned workers and tracebacks after Ctrl-C or a cancelled job."""
    tokenizer.save(tmp_path / "tokenizer")
    source = jsonl(["we the people of the united states " * 2000] * 800)
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), source, "--output", str(tmp_path / "out")]
    with subprocess.Popen(
        [*command, "--tokenizer", str(tmp_path / "tokenizer"), "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    ) as process:
        while process.poll() is None and not list(tmp_path.glob("out/.tmp-*")):
            time.sleep(0.02)
        assert process.poll() is None, "it must still be running when the signal is sent"
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in errors) == (code, False), errors
    assert contents(tmp_path / "out") == {}
