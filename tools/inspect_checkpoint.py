"""What a checkpoint or model folder holds, whether all its checksums hold, and how two of them differ."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def inspect_checkpoint(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Run, checkpoint or model folder of any known format.")],
    diff: Annotated[
        str | None,
        typer.Option("--diff", metavar="DIR", help="Compare with this one; exit code 1 if they differ."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="DeepSpeed's folders: the run's config.yaml or the model's config.json."),
    ] = None,
) -> None:
    """Print kind, step, layout, parameters by part, types, provenance and integrity. Exit code 2 for a damaged one."""
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()
    from recycle_ds.checkpoint.conversion.inspection import compare, describe, print_comparison, print_description

    if diff is None:
        print_description(describe(folder, config), as_json=as_json)
        return
    found = compare(folder, diff, config)
    print_comparison(found, as_json=as_json)
    sys.exit(0 if found["equal"] else 1)


if __name__ == "__main__":
    run_command(app, None)
