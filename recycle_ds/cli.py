"""`recycle-ds`: one console script in front of the entry points.

It only forwards: each subcommand's options, help and errors are those of `python -m recycle_ds.<subcommand>`. The entry
point is imported when its subcommand is called, so that help and typing errors answer at once, without torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from recycle_ds import __version__

COMMANDS = {
    "pretrain": "Pretrain a RecycleGPT, or give an existing model a recycle module.",
    "generate": "Continue a prompt: autoregressive, alternate (the paper) or verified (lossless) decoding.",
    "evaluate": "Perplexity and draft acceptance of a model on a text file.",
}

app = typer.Typer(
    name="recycle-ds",
    help="RecycleGPT on megatron-core and DeepSpeed. `recycle-ds COMMAND --help` lists a command's options.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(argv: list[str] | None = None) -> None:
    """Console entry point; argv without the program's name, by default the process's own."""
    app(args=argv, prog_name="recycle-ds")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recycle-ds {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options that stand before the subcommand."""


def _forward(context: typer.Context) -> None:
    """Calls the entry point named like the subcommand with every argument that follows it, `--help` included."""
    command, arguments = str(context.info_name), list(context.args)
    # The entry point names itself in its usage line and in the run's provenance by sys.argv.
    sys.argv = [f"recycle-ds {command}", *arguments]
    importlib.import_module(f"recycle_ds.{command}").main(arguments)


for _name, _help in COMMANDS.items():
    app.command(
        _name,
        help=_help,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_forward)


if __name__ == "__main__":
    main()
