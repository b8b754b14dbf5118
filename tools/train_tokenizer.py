#!/usr/bin/env python
"""Train a byte-level BPE tokenizer on a corpus."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer


def main(
    source: Annotated[
        str,
        typer.Argument(help="'shipped', a text, jsonl or parquet file, a folder of them, or a Hugging Face dataset."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for tokenizer.json and tokenizer_config.json, made if missing.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary, at least 257.")],
    text_column: Annotated[
        str, typer.Option(help="Column that holds the text, in jsonl, parquet and datasets.")
    ] = "text",
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a dataset while it downloads.")] = False,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
) -> None:
    """Train a tokenizer of VOCAB_SIZE tokens on SOURCE; the same text always gives the same tokenizer."""
    # A termination request unwinds like Ctrl-C, so that unfinished files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from rich.console import Console
    from rich.table import Table

    from recycle_ds.config.errors import RecycleError
    from recycle_ds.data.sources import read_documents
    from recycle_ds.data.tokenizer import Tokenizer

    try:
        texts = read_documents(source, text_column, streaming=streaming, split=split)
        tokenizer = Tokenizer.train(texts, vocab_size)
        tokenizer.save(output)
    except RecycleError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None
    table = Table("file", "tokens", "end of text", "fingerprint")
    table.add_row(
        str(output / "tokenizer.json"), f"{tokenizer.vocab_size:,}", str(tokenizer.eos_id), tokenizer.fingerprint[:12]
    )
    Console().print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
