#!/usr/bin/env python
"""Tokenise a corpus into the token files that pretraining reads."""

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
    output: Annotated[Path, typer.Option(help="Folder for train.* and validation.*, made if missing.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, or a folder that holds one.")],
    text_column: Annotated[
        str, typer.Option(help="Column that holds the text, in jsonl, parquet and datasets.")
    ] = "text",
    validation_fraction: Annotated[float, typer.Option(help="Share of documents held out; 0 holds out none.")] = 0.02,
    workers: Annotated[int | None, typer.Option(help="Tokenising processes [default: the cores one may use].")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a dataset while it downloads.")] = False,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    seed: Annotated[int, typer.Option(help="Draws the held-out documents.")] = 0,
) -> None:
    """Tokenise SOURCE into Megatron token files, train and validation, split by document."""
    # A termination request unwinds like Ctrl-C, so that unfinished files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from rich.console import Console
    from rich.table import Table

    from recycle_ds.config.errors import RecycleError
    from recycle_ds.data.prepare import prepare
    from recycle_ds.data.tokenizer import Tokenizer

    try:
        report = prepare(
            source,
            output,
            Tokenizer.load(tokenizer),
            text_column=text_column,
            validation_fraction=validation_fraction,
            workers=workers,
            streaming=streaming,
            split=split,
            seed=seed,
            progress=True,
        )
    except RecycleError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None
    table = Table("files", "documents", "tokens", title=f"{report.source}, {report.blank:,} blank documents left out")
    for made in filter(None, (report.train, report.validation)):
        table.add_row(f"{made.prefix}.bin .idx .json", f"{made.documents:,}", f"{made.tokens:,}")
    Console().print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
