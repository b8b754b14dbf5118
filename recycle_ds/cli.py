"""`recycle-ds`: one console script for every command.

It only forwards: options, help and errors of a subcommand are those of the module behind it. That module is imported when the
subcommand is called, so that help and typing errors are answered at once, without torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Annotated

import typer

from recycle_ds import __version__
from recycle_ds.config.command import run_command, user_errors
from recycle_ds.config.errors import ConfigError
from recycle_ds.parallel.job import is_error_reporter

COMMANDS = {
    "pretrain": ("recycle_ds.pretrain", "Pretrain a RecycleGPT, or give an existing model a recycle module."),
    "generate": (
        "recycle_ds.generate",
        "Continue prompts: autoregressive, alternate (the paper) or verified (lossless).",
    ),
    "serve": ("recycle_ds.serve", "Serve a model over HTTP, with OpenAI's API and a page."),
    "evaluate": ("recycle_ds.evaluate", "Perplexity and draft acceptance of a model on a text file."),
    "report": ("recycle_ds.report", "Report training runs, or compare several, as one HTML file."),
    "convert": (
        "recycle_ds.checkpoint.conversion.command",
        "Convert a model between Hugging Face, portable, Megatron and vLLM/SGLang.",
    ),
    "inspect": ("recycle_ds.checkpoint.conversion.inspect_command", "Show what a model folder holds, or compare two."),
    "plan": ("recycle_ds.planning.command", "Rank the layouts of a run that fit a cluster."),
    "prepare": ("recycle_ds.data.prepare_command", "Tokenise a corpus into token files."),
    "tokenizer": ("recycle_ds.data.tokenizer_command", "Train a tokenizer on a corpus."),
}
"""Module behind each subcommand, and its line in the help."""

app = typer.Typer(
    name="recycle-ds",
    help="RecycleGPT on megatron-core and DeepSpeed. `recycle-ds COMMAND --help` lists a command's options.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(argv: list[str] | None = None) -> None:
    """Console entry point; argv without the program's name, by default the process's own."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        app(args=arguments, prog_name="recycle-ds")  # prints the help
    with user_errors(print_error=is_error_reporter(os.environ)):
        _check_command(arguments[0])
    run_command(app, arguments, print_error=is_error_reporter(os.environ))


def _check_command(word: str) -> None:
    """Raises ConfigError if the first argument is neither an option nor a subcommand."""
    if not word.startswith("-") and word not in COMMANDS:
        near = difflib.get_close_matches(word, COMMANDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"'{word}' is no command: {hint}the commands are {', '.join(COMMANDS)}")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recycle-ds {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the subcommand."""


def _forward(context: typer.Context) -> None:
    """Calls the subcommand's module with every argument that follows, `--help` included."""
    command, arguments = str(context.info_name), list(context.args)
    # the usage line and a run's provenance name the command by sys.argv
    sys.argv = [f"recycle-ds {command}", *arguments]
    importlib.import_module(COMMANDS[command][0]).main(arguments)


for _name, (_module, _help) in COMMANDS.items():
    app.command(
        _name,
        help=_help,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_forward)


if __name__ == "__main__":
    main()
