"""From a source of documents to a train and a validation token file, the same for every number of workers."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_ds.data.encoding import SpecialTokenCounts, encode_in_order, usable_cores
from recycle_ds.data.errors import DataError
from recycle_ds.data.prepare_report import PrepareReport, SplitReport
from recycle_ds.data.progress_bar import PrepareBar
from recycle_ds.data.reading.chat import ChatTemplate
from recycle_ds.data.reading.report import ReadingOptions, ReadReport
from recycle_ds.data.sources import check_outside, read_documents
from recycle_ds.data.token_files import TokenFileWriter, pair_paths, read_sidecar
from recycle_ds.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from recycle_ds.config.schema import DataConfig, PrepareConfig

TRAIN, VALIDATION = "train", "validation"
"""Prefixes of the two token files in the output folder."""


def is_validation(number: int, fraction: float, seed: int) -> bool:
    """Whether document `number` (from 0) is held out: a pure function, so other documents do not matter.

    Of the first two documents one goes to each side, so that neither is empty; the others are drawn independently.
    """
    if fraction <= 0:
        return False
    digest = hashlib.blake2b(f"{seed}/{0 if number < 2 else number}".encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "little")
    return draw % 2 == number if number < 2 else draw < fraction * 2**64


def prepare(
    source: str,
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    text_column: str = "text",
    chat: ChatTemplate | None = None,
    parse_special: bool = False,
    validation_fraction: float = 0.02,
    workers: int | None = None,
    streaming: bool = False,
    split: str = "train",
    options: ReadingOptions | None = None,
    seed: int = 0,
    progress: bool = False,
) -> PrepareReport:
    """Tokenise a source into the token files `output`/train and, unless the fraction is 0, `output`/validation.

    Each file appears whole or not at all, and is the same for every number of workers.

    Args:
        source, text_column, chat, streaming, split, options: as in `sources.read_documents`.
        parse_special: whether special tokens that are written in a document (`<|endoftext|>`) stand for themselves; else they
            are text. They are counted in both cases. Those of a chat template stand for themselves.
        output: folder, made if missing.
        tokenizer: whose ids are written.
        validation_fraction: share of documents held out, from 0 to below 1. Each is drawn on its own, so the share is
            approximate; above 0, at least one document is on each side.
        workers: processes that tokenise; as many as this process may use cores if not given.
        seed: draws the held-out documents.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        DataError: the source cannot be read or split, or the files cannot be written.
    """
    _check_fraction(validation_fraction)
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}; at least 1 process has to tokenise")
    check_outside(source, Path(output))
    options = options or ReadingOptions()
    recipe = _recipe(text_column, chat is not None, parse_special, validation_fraction, options)
    recipe |= {"seed": seed, "split": split}
    reading, special = ReadReport(), SpecialTokenCounts()
    names = (TRAIN, VALIDATION) if validation_fraction > 0 else (TRAIN,)
    documents = blank = tokens = 0
    try:
        with PrepareBar(source, progress) as bar, contextlib.ExitStack() as stack:
            texts = read_documents(
                source, text_column, chat=chat, streaming=streaming, split=split, options=options, report=reading,
                progress=bar.read,
            )  # fmt: skip
            writers = [
                stack.enter_context(TokenFileWriter(Path(output) / name, tokenizer, source, recipe)) for name in names
            ]
            encoded = encode_in_order(
                texts, tokenizer, workers or usable_cores(), parse_special=parse_special, counts=special
            )
            for ids in stack.enter_context(contextlib.closing(encoded)):
                if len(ids):
                    writers[is_validation(documents, validation_fraction, seed)].add(ids)
                    documents, tokens = documents + 1, tokens + len(ids) + 1
                else:
                    blank += 1
                bar.wrote(documents, tokens)
            _check_sides(source, documents, validation_fraction)
    except OSError as error:
        raise DataError(f"cannot write to {output}: {error.strerror or error}; free or choose a folder") from error
    made = [SplitReport(str(Path(output) / n), w.documents, w.tokens) for n, w in zip(names, writers, strict=True)]
    return PrepareReport(source, made[0], made[1] if len(made) > 1 else None, blank, reading, special, parse_special)


def check_output(output: Path, validation_fraction: float, *, overwrite: bool) -> None:
    """Raises DataError for a wrong fraction, and for token files that `prepare` would write, unless they may be
    overwritten."""
    _check_fraction(validation_fraction)
    names = (TRAIN, VALIDATION) if validation_fraction > 0 else (TRAIN,)
    found = [path for name in names for path in pair_paths(output / name) if path.exists()]
    if found and not overwrite:
        raise DataError(f"{found[0]} already exists: name another --output, or replace the files with --overwrite")


def prepare_if_missing(
    config: DataConfig, *, workers: int | None = None, progress: bool = False
) -> PrepareReport | None:
    """Make the tokenizer and token files that a run names, by its `data.prepare`, if any of them is missing.

    Call it on one rank while the others wait. A tokenizer that exists is used, not trained again.

    Returns:
        What was made, or None if nothing was missing.

    Raises:
        DataError: something is missing that `data.prepare` does not make, or what exists was made with other settings.
    """
    missing, recipe = check_data(config), config.prepare
    if recipe is None:
        return None
    tokenizer_file = _tokenizer_file(config.tokenizer)
    if tokenizer_file.is_file():
        tokenizer = Tokenizer.load(tokenizer_file)
        if recipe.tokenizer_vocab is not None and tokenizer.vocab_size != recipe.tokenizer_vocab:
            raise DataError(
                f"{tokenizer_file} has {tokenizer.vocab_size} tokens, data.prepare.tokenizer_vocab is "
                f"{recipe.tokenizer_vocab}; change one of them, or remove the file to train it again"
            )
    if not missing:
        _check_recipe(config, recipe)
        return None
    if not tokenizer_file.is_file():
        assert recipe.tokenizer_vocab is not None  # else its absence was refused above
        check_outside(recipe.source, Path(recipe.output))
        texts = read_documents(recipe.source, recipe.text_column, split=recipe.split, options=_options(recipe))
        tokenizer = Tokenizer.train(texts, recipe.tokenizer_vocab)
        tokenizer.save(recipe.output)
    return prepare(
        recipe.source,
        recipe.output,
        tokenizer,
        text_column=recipe.chat_column or recipe.text_column,
        chat=ChatTemplate.load(tokenizer_file, tokenizer) if recipe.chat_column else None,
        parse_special=recipe.parse_special,
        validation_fraction=recipe.validation_fraction,
        workers=workers,
        split=recipe.split,
        options=_options(recipe),
        progress=progress,
    )


def _options(recipe: PrepareConfig) -> ReadingOptions:
    return ReadingOptions(recipe.skip_invalid, recipe.all_files, recipe.exclude)


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise DataError(
            f"the validation fraction is {fraction}; it must be from 0 to below 1: documents to train on remain"
        )


def check_data(config: DataConfig) -> list[Path]:
    """Tokenizer and token files that are missing. Raises DataError for one that `data.prepare` does not make."""
    tokenizer_file, recipe = _tokenizer_file(config.tokenizer), config.prepare
    missing = [] if tokenizer_file.is_file() else [tokenizer_file]
    for source in (*config.train, *config.validation):
        missing += [path for path in pair_paths(source.path) if not path.is_file()]
    made = set() if recipe is None else _made_by(recipe)
    for path in missing:
        if recipe is None:
            raise DataError(f"no such file: {path}; make it with {_command(path, config)}, or set data.prepare")
        if path.resolve() not in made:
            raise DataError(
                f"no such file: {path}; data.prepare makes only {recipe.output}/{TRAIN}, {recipe.output}/{VALIDATION} "
                f"and, with tokenizer_vocab, the tokenizer there; make it with {_command(path, config)}"
            )
    return missing


def vocabulary_size(config: DataConfig) -> int:
    """Number of tokens of a run's tokenizer, also of one that `data.prepare` has still to train. Raises DataError."""
    file, recipe = _tokenizer_file(config.tokenizer), config.prepare
    trained = recipe is not None and file.resolve() in _made_by(recipe)
    if recipe is not None and recipe.tokenizer_vocab is not None and trained and not file.is_file():
        return recipe.tokenizer_vocab  # training yields exactly as many, or fails
    return Tokenizer.load(config.tokenizer).vocab_size


def _tokenizer_file(path: str) -> Path:
    return Path(path) if path.endswith(".json") else Path(path) / "tokenizer.json"


def _made_by(recipe: PrepareConfig) -> set[Path]:
    """Resolved paths of all files that a recipe makes."""
    names = [TRAIN, VALIDATION] if recipe.validation_fraction > 0 else [TRAIN]
    files = {path.resolve() for name in names for path in pair_paths(Path(recipe.output) / name)}
    if recipe.tokenizer_vocab is not None:
        files.add((Path(recipe.output) / "tokenizer.json").resolve())
    return files


def _check_recipe(config: DataConfig, recipe: PrepareConfig) -> None:
    """Refuse files that `data.prepare` would have made otherwise: a run must not ignore what its configuration says."""
    made = _made_by(recipe)
    wanted = (
        {"source": recipe.source}
        | _recipe(
            recipe.chat_column or recipe.text_column,
            recipe.chat_column is not None,
            recipe.parse_special,
            recipe.validation_fraction,
            _options(recipe),
        )
        | {"split": recipe.split}
    )
    for source in (*config.train, *config.validation):
        if pair_paths(source.path)[0].resolve() not in made:
            continue
        sidecar = read_sidecar(source.path)
        found = {**_OLD_RECIPE, "source": sidecar.source, **sidecar.recipe}
        for key, value in wanted.items():
            if found.get(key) != value:
                raise DataError(
                    f"{source.path} was made with {key} {found.get(key)!r}, data.prepare.{key} is {value!r}; remove "
                    f"{recipe.output} to make it again, or choose another data.prepare.output"
                )


def _command(path: Path, config: DataConfig) -> str:
    """The command that makes a missing file."""
    if path == _tokenizer_file(config.tokenizer):
        named = "" if path.name == "tokenizer.json" else f" and data.tokenizer={path.parent}/tokenizer.json"
        return f"`recycle-ds tokenizer SOURCE --output {path.parent} --vocab-size N`{named}"
    return f"`recycle-ds prepare SOURCE --output {path.parent} --tokenizer {config.tokenizer}`"


def _recipe(
    text_column: str, chat: bool, parse_special: bool, validation_fraction: float, options: ReadingOptions
) -> dict[str, Any]:
    """The settings of `data.prepare`, besides the source, that decide what a token file holds."""
    decisive = {"text_column": text_column, "validation_fraction": validation_fraction}
    return decisive | _OLD_RECIPE | {"chat": chat, "parse_special": parse_special} | _as_json(options)


def _as_json(options: ReadingOptions) -> dict[str, Any]:
    return asdict(options) | {"exclude": list(options.exclude)}


# For files of older versions, which do not record these settings. (Special tokens in their documents were parsed.)
_OLD_RECIPE = {"chat": False, "parse_special": False, **_as_json(ReadingOptions())}


def _check_sides(source: str, documents: int, fraction: float) -> None:
    if documents == 0:
        raise DataError(f"{source} holds only blank documents; give a source with text")
    if fraction > 0 and documents < 2:
        raise DataError(
            f"{source} is a single document, which cannot be split into train and validation; "
            "set the validation fraction to 0 or give more documents"
        )
