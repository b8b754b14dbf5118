"""What became of runs, read from what they left: `tools/summarise_runs.py`, and the last task of a sweep."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recycle_ds.training.errors import TrainingError
from recycle_ds.training.reporting.sessions import SUMMARY, describe

_GOOD = ("finished", "stop_at")
# Characters of an error in the table; it stands below as a whole.
_SHOWN = 40
# Columns of a log, which nothing folds; a terminal says its own.
_WIDTH = 240


def summarise_runs(run_dirs: Sequence[str], *, as_json: bool) -> bool:
    """Prints to stdout; whether all runs are finished. Raises TrainingError for a folder that does not exist."""
    rows = {name: read_summary(Path(name)) for name in run_dirs}
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
    """summary.json of a run with its last loss; of one that never began, its state says why."""
    if not run_dir.is_dir():
        raise TrainingError(f"{run_dir}: no such folder; name folders of runs")
    error = run_dir / "error.txt"
    said = error.read_text(encoding="utf-8").strip() if error.is_file() else ""
    try:
        tree = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"state": said or "never began", "step": 0, "steps": None}
    except (OSError, ValueError) as fault:
        raise TrainingError(f"{run_dir / SUMMARY}: cannot be read ({fault})") from None
    if said and tree["state"] not in _GOOD:
        tree["state"] = said
    return tree | {"loss": _last_loss(run_dir / "metrics.jsonl")}


def _last_loss(metrics: Path) -> float | None:
    found = None
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(line).get("loss", found)
            except (json.JSONDecodeError, AttributeError):  # cut by a kill
                continue
    return found


def _one_line(state: object) -> str:
    return " ".join(str(state).split())


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    table = Table()
    for heading in ("run", "state", "step", "loss", "restarts", "lost s", "anomalies"):
        table.add_column(heading, overflow="fold")
    for name, row in rows.items():
        loss = row.get("loss")
        anomalies = ", ".join(f"{event} {count}" for event, count in row.get("anomalies", {}).items())
        state = _one_line(row["state"])
        cells = (
            name,
            state if len(state) <= _SHOWN else f"{state[: _SHOWN - 3]}...",
            f"{row['step']}/{row['steps'] or '?'}",
            "-" if loss is None or not math.isfinite(loss) else f"{loss:.4f}",
            str(row.get("restarts", 0)),
            f"{row.get('lost_seconds', 0):.0f}",
            anomalies or "-",
        )
        # as they are: a string would be read as markup, and an error may hold anything
        table.add_row(*(Text(cell) for cell in cells))
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
