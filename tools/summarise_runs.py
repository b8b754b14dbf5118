"""Prints the state of runs, one line each, and names those that failed. Exit code 1 if one of them is not finished."""

from __future__ import annotations

from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def summarise_runs(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="Run folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, by run folder.")] = False,
) -> None:
    """Summarise runs: state, step, losses, restarts, lost time, anomalies; a single run in more detail."""
    from recycle_ds.training.reporting.runs_table import summarise_runs as summarise

    raise typer.Exit(0 if summarise(run_dirs, as_json=as_json) else 1)


if __name__ == "__main__":
    run_command(app, None)
