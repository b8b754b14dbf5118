"""The state of several runs as a table: `tools/summarise_runs.py`, and the end of a sweep."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from recycle_ds.config.console import output_console
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.reporting.sessions import SUMMARY, describe

_GOOD = ("finished", "stop_at")
# Characters of an error in the table; the full text is printed below it.
_SHOWN = 40


def summarise_runs(run_dirs: Sequence[str], *, as_json: bool) -> bool:
    """Prints the runs to stdout; returns whether all are finished. Files are left out, so that `runs/*` names all runs.

    Raises TrainingError for a folder that does not exist, and if there is none.
    """
    files = [name for name in run_dirs if Path(name).is_file()]
    if files:
        print(f"note: not a folder, left out: {', '.join(files)}", file=sys.stderr)
    rows = {name: read_summary(Path(name)) for name in run_dirs if name not in files}
    if not rows:
        raise TrainingError("no folder of a run is named")
    bad = [name for name, row in rows.items() if row["state"] not in _GOOD]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif len(rows) == 1 and "sessions" in next(iter(rows.values())):
        ((name, row),) = rows.items()
        print(describe(row, name))
    else:
        _print_table(rows)
        for name in bad:
            print(f"not finished: {name}: {_one_line(rows[name]['state'])}")
    return not bad


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a run with its last losses; the state of a run that never started is the error that prevented it.

    Raises TrainingError for a folder that does not exist, or whose summary cannot be read.
    """
    if not run_dir.is_dir():
        raise TrainingError(f"{run_dir}: no such folder; name folders of runs")
    error = run_dir / "error.txt"
    message = error.read_text(encoding="utf-8").strip() if error.is_file() else ""
    try:
        tree = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"state": message or "never started", "step": 0, "steps": None}
    except (OSError, ValueError) as damage:
        raise TrainingError(f"{run_dir / SUMMARY}: cannot be read ({damage})") from None
    if message and tree["state"] not in _GOOD:
        tree["state"] = message
    return tree | _last_losses(run_dir / "metrics.jsonl")


def _last_losses(metrics: Path) -> dict[str, float | None]:
    """`loss` (the weighted total) and `backbone_loss` of the last logged step; None before the first."""
    found: dict[str, float | None] = {"loss": None, "backbone_loss": None}
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut off by a kill
                continue
            if isinstance(record, dict):
                found |= {key: record[key] for key in found if key in record}
    return found


def _one_line(state: object) -> str:
    return " ".join(str(state).split())


def _loss(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    table = Table()
    for heading in ("run", "state", "step", "loss", "backbone", "restarts", "lost s", "anomalies"):
        table.add_column(heading, overflow="fold")
    for name, row in rows.items():
        anomalies = ", ".join(f"{event} {count}" for event, count in row.get("anomalies", {}).items())
        state = _one_line(row["state"])
        cells = (
            name,
            state if len(state) <= _SHOWN else f"{state[: _SHOWN - 3]}...",
            f"{row['step']}/{row['steps'] or '?'}",
            _loss(row.get("loss")),
            _loss(row.get("backbone_loss")),
            str(row.get("restarts", 0)),
            f"{row.get('lost_seconds', 0):.0f}",
            anomalies or "-",
        )
        # a plain string would be parsed as markup, and an error may contain anything
        table.add_row(*(Text(cell) for cell in cells))
    output_console().print(table)
