"""Entry point: a report of runs as one HTML file. `python -m recycle_ds.report RUN... [--output FILE]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_ds.config.command import run_command

if TYPE_CHECKING:
    from recycle_ds.training.reporting.run_report.runs import Checkpoints

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    output: Annotated[
        str | None,
        typer.Option(help="HTML file; report.html in the run's folder, of several runs in the current directory."),
    ] = None,
) -> None:
    """Report training runs: losses, acceptance, speed, memory, restarts, anomalies and settings, also while they train."""
    from recycle_ds.training.reporting.run_report.runs import read_runs
    from recycle_ds.training.reporting.run_report.texts import encodable
    from recycle_ds.training.reporting.run_report.writing import output_file, write_report

    found = read_runs(runs, published_checkpoints)
    path = output_file([run.path for run in found], output)
    for run in found:
        for note in run.notes:
            print(f"note: {run.path}: {note}", file=sys.stderr)
    from recycle_ds.training.reporting.run_report.page import render

    write_report(path, render(found))
    number = "1 run" if len(found) == 1 else f"{len(found)} runs"
    print(f"{encodable(str(path))}: {number}, {path.stat().st_size / 1024:,.0f} KiB")


def published_checkpoints(run_dir: Path) -> Checkpoints:
    """The published checkpoints of a run, and the provenance in the newest one's manifest."""
    from recycle_ds.checkpoint.errors import CheckpointError
    from recycle_ds.checkpoint.files.checksums import read_json
    from recycle_ds.checkpoint.portable.folders import completed, step_of
    from recycle_ds.checkpoint.portable.manifest import MANIFEST
    from recycle_ds.training.reporting.run_report.runs import Checkpoints

    folders = completed(run_dir)
    if not folders:
        return Checkpoints()
    steps = tuple(step for folder in folders if (step := step_of(folder)) is not None)
    try:
        provenance = read_json(folders[0] / MANIFEST).get("provenance")
    except CheckpointError as error:
        return Checkpoints(steps, problem=str(error))
    return Checkpoints(steps, provenance if isinstance(provenance, dict) else {})


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, or the process's own arguments."""
    run_command(app, argv)


if __name__ == "__main__":
    main()
