"""What became of runs: one line each, the bad ones named. Exit code 1 if one of them is not finished."""

from __future__ import annotations

from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def summarise_runs(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="Folders of runs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object by run.")] = False,
) -> None:
    """Summarise runs: how far they came, restarts, lost time, anomalies; a single run in more detail."""
    from recycle_ds.training.reporting.runs_table import summarise_runs as summarise

    raise typer.Exit(0 if summarise(run_dirs, as_json=as_json) else 1)


if __name__ == "__main__":
    run_command(app, None)
