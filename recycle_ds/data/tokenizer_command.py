"""The command `recycle-ds tokenizer` (tools/train_tokenizer.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import INTERRUPTED, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train_tokenizer(
    source: Annotated[
        str,
        typer.Argument(
            help="'shipped', a text, json, jsonl or parquet file, a folder of them, a folder that save_to_disk wrote, or a "
            "Hugging Face dataset, OWNER/NAME."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for tokenizer.json and tokenizer_config.json, created if missing.")
    ],
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary, at least 257.")],
    text_column: Annotated[
        str,
        typer.Option(help="Column that holds the text, in jsonl, parquet and datasets; data.text inside an object."),
    ] = "text",
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out and count rows and files that cannot be used.")
    ] = False,
    all_files: Annotated[
        bool, typer.Option("--all-files", help="Read hidden files and dataset cards of a folder too.")
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of files of a folder to leave out; may be repeated.")
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a dataset while it downloads.")] = False,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a tokenizer that exists.")] = False,
) -> None:
    """Train a tokenizer of VOCAB_SIZE tokens on SOURCE; the same text always gives the same tokenizer."""
    from rich.table import Table

    from recycle_ds.config.console import output_console
    from recycle_ds.data.errors import DataError
    from recycle_ds.data.interruptible import exit_on_sigterm
    from recycle_ds.data.reading.report import ReadingOptions, ReadReport
    from recycle_ds.data.sources import check_outside, read_documents
    from recycle_ds.data.tokenizer import Tokenizer

    exit_on_sigterm()
    file = output / "tokenizer.json"
    if file.exists() and not overwrite:
        raise DataError(f"{file} already exists: name another --output, or replace it with --overwrite")
    check_outside(source, output)
    report = ReadReport()
    options = ReadingOptions(skip_invalid, all_files, tuple(exclude or ()))
    try:
        texts = read_documents(source, text_column, streaming=streaming, split=split, options=options, report=report)
        tokenizer = Tokenizer.train(texts, vocab_size)
        tokenizer.save(output)
    except (KeyboardInterrupt, SystemExit) as end:
        print("interrupted; nothing was written", file=sys.stderr, flush=True)
        # at once: the interpreter must not be taken down under a thread of the library that still computes
        os._exit(int(end.code or 0) if isinstance(end, SystemExit) else INTERRUPTED)
    table = Table("file", "tokens", "end of text", "fingerprint")
    table.add_row(str(file), f"{tokenizer.vocab_size:,}", str(tokenizer.eos_id), tokenizer.fingerprint[:12])
    output_console().print(table)
    for line in report.lines():
        print(line)


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments."""
    run_command(app, argv)
