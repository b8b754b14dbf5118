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
            help="'shipped', a text, json, jsonl or parquet file, a folder of them, a folder that save_to_disk wrote, or a "
            "Hugging Face dataset, OWNER/NAME."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for train.* and validation.*, created if missing.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, or a folder that holds one.")],
    text_column: Annotated[
        str,
        typer.Option(help="Column that holds the text, in jsonl, parquet and datasets; data.text inside an object."),
    ] = "text",
    chat_column: Annotated[
        str | None, typer.Option(help="Column with lists of messages, rendered by the tokenizer's chat template.")
    ] = None,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Special tokens written in documents stand for themselves.")
    ] = False,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out and count rows and files that cannot be used.")
    ] = False,
    all_files: Annotated[
        bool, typer.Option("--all-files", help="Read hidden files and dataset cards of a folder too.")
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of files of a folder to leave out; may be repeated.")
    ] = None,
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
    from recycle_ds.data.prepare import VALIDATION, check_output, prepare
    from recycle_ds.data.reading.chat import ChatTemplate
    from recycle_ds.data.reading.report import ReadingOptions
    from recycle_ds.data.token_files import pair_paths
    from recycle_ds.data.tokenizer import Tokenizer

    exit_on_sigterm()
    check_output(output, validation_fraction, overwrite=overwrite)
    kept = next((path for path in pair_paths(output / VALIDATION) if path.exists()), None)
    try:
        loaded = Tokenizer.load(tokenizer)
        report = prepare(
            source,
            output,
            loaded,
            text_column=chat_column or text_column,
            chat=ChatTemplate.load(tokenizer, loaded) if chat_column else None,
            parse_special=parse_special,
            options=ReadingOptions(skip_invalid, all_files, tuple(exclude or ())),
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
    table = Table("files", "documents", "tokens", title=report.source)
    for made in filter(None, (report.train, report.validation)):
        table.add_row(f"{made.prefix}.bin .idx .json", f"{made.documents:,}", f"{made.tokens:,}")
    output_console().print(table)
    for line in report.lines():
        print(line)
    if report.validation is None and kept:
        print(f"note: {kept} is older and was kept: with --validation-fraction 0 no document is held out")


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments."""
    run_command(app, argv)
