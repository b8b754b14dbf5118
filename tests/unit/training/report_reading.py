"""What tests of the report read: runs, curves, the page's values, and what the command prints."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.report import main, published_checkpoints
from recycle_ds.training.reporting.run_report.panels import Panel, panels
from recycle_ds.training.reporting.run_report.runs import Run, read_runs


def read(*folders: Path) -> list[Run]:
    return read_runs([str(folder) for folder in folders], published_checkpoints)


def panel(runs: list[Run], title: str) -> Panel:
    (found,) = [one for one in panels(runs) if one.title == title]
    return found


def values(found: Panel, label: str) -> list[float]:
    (series,) = [one for one in found.series if one.label == label]
    return series.values.tolist()


def page_data(page: str) -> list[dict[str, Any]]:
    """The values that the page's script reads, by plot."""
    found: list[dict[str, Any]] = json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0]
    )
    return found


def titles(page: str) -> list[str]:
    return [html.unescape(title) for title in re.findall(r"<figcaption><h3>(.*?)</h3>", page)]


def run_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err
