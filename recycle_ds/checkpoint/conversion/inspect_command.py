"""The command `recycle-ds inspect` (tools/inspect_checkpoint.py)."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from recycle_ds.checkpoint.portable.folders import check_folder
from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def inspect_checkpoint(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Run, checkpoint or model folder in any supported format.")
    ],
    diff: Annotated[
        str | None,
        typer.Option("--diff", metavar="DIR", help="Compare with this folder; exit code 1 if they differ."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="For DeepSpeed folders: the run's config.yaml or the model's config.json."),
    ] = None,
) -> None:
    """Print kind, step, layout, parameters by part, dtypes, provenance and integrity. Exit code 2 for a damaged folder."""
    for path in (folder, *([diff] if diff else [])):
        check_folder(path)  # before torch, which takes seconds to import
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()
    from recycle_ds.checkpoint.conversion.comparison import compare, print_comparison
    from recycle_ds.checkpoint.conversion.inspection import describe, print_description

    if diff is None:
        print_description(describe(folder, config), as_json=as_json)
        return
    found = compare(folder, diff, config)
    print_comparison(found, as_json=as_json)
    sys.exit(0 if found["equal"] else 1)


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments."""
    run_command(app, argv)
