"""The command `recycle-ds prepare` (tools/prepare_data.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import INTERRUPTED, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="'shipped', a text, jsonl or parquet file, a folder of them, or a Hugging Face dataset, OWNER/NAME."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for train.* and validation.*, created if missing.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, or a folder that holds one.")],
    text_column: Annotated[
        str, typer.Option(help="Column that holds the text, in jsonl, parquet and datasets.")
    ] = "text",
    validation_fraction: Annotated[
        float, typer.Option(help="Share of documents held out, below 1, each drawn on its own; 0 holds out none.")
    ] = 0.02,
    workers: Annotated[
        int | None, typer.Option(help="Tokenising processes; by default one for each usable core.")
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a dataset while it downloads.")] = False,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    seed: Annotated[int, typer.Option(help="Draws the held-out documents.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace token files that exist.")] = False,
) -> None:
    """Tokenise SOURCE into Megatron token files, train and validation, split by document."""
    from rich.table import Table

    from recycle_ds.config.console import output_console
    from recycle_ds.data.interruptible import exit_on_sigterm
    from recycle_ds.data.prepare import check_output, prepare
    from recycle_ds.data.tokenizer import Tokenizer

    exit_on_sigterm()
    check_output(output, validation_fraction, overwrite=overwrite)
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
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    table = Table("files", "documents", "tokens", title=f"{report.source}, {report.blank:,} blank documents left out")
    for made in filter(None, (report.train, report.validation)):
        table.add_row(f"{made.prefix}.bin .idx .json", f"{made.documents:,}", f"{made.tokens:,}")
    output_console().print(table)


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments."""
    run_command(app, argv)
