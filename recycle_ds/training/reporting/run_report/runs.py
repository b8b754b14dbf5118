"""What a run folder says about its run. Files that are absent or damaged are noted, not fatal."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recycle_ds.config.yaml_values import UNREADABLE, Loader
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.reporting.run_report.metrics import Metrics, read_metrics
from recycle_ds.training.reporting.run_report.paths import mode_of
from recycle_ds.training.reporting.sessions import SUMMARY

METRICS, LAYOUT, CONFIG, ERROR = "metrics.jsonl", "run.json", "config.yaml", "error.txt"
MAX_RUNS = 16
"""Runs in one report: eight colours, solid and dashed."""
# Characters of an error.txt that are shown.
_MAX_TEXT = 4000


@dataclass(frozen=True)
class Checkpoints:
    """The published checkpoints of a run, and the provenance in the newest one's manifest."""

    steps: tuple[int, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    """Why the provenance is unknown."""


ReadCheckpoints = Callable[[Path], Checkpoints]
"""Reads the checkpoints of a run folder. Raises OSError if the folder of checkpoints cannot be listed."""


@dataclass(frozen=True)
class Run:
    """One run as its files describe it; a missing file is an empty object."""

    path: Path
    label: str
    """The shortest end of the path that no other run of the report has."""
    metrics: Metrics
    layout: dict[str, Any]
    """run.json."""
    summary: dict[str, Any]
    config: dict[str, Any]
    checkpoints: Checkpoints
    error: str
    """The error that ended a start of the run before its first step."""
    notes: tuple[str, ...]
    """What is missing or damaged."""


def read_runs(folders: Sequence[str], checkpoints: ReadCheckpoints) -> list[Run]:
    """Reads run folders. Files beside them are left out with a note on stderr, so that `runs/*` names all runs.

    Raises TrainingError if a folder does not exist, cannot be read, is not a run's or is named twice, and if there
    are more than MAX_RUNS.
    """
    files = [folder for folder in folders if stat.S_ISREG(mode_of(Path(folder)))]
    if files and len(files) < len(folders):
        print(f"note: not a folder, left out: {', '.join(files)}", file=sys.stderr)
        folders = [folder for folder in folders if folder not in files]
    paths = [Path(folder) for folder in folders]
    if len(paths) > MAX_RUNS:
        raise TrainingError(f"{len(paths)} runs: a report compares at most {MAX_RUNS}; name fewer")
    for path in paths:
        _check(path)
    resolved = [path.resolve() for path in paths]
    for path, real in zip(paths, resolved, strict=True):
        if resolved.count(real) > 1:
            raise TrainingError(f"{path}: named twice; name each run once")
    return [_read(path, label, checkpoints) for path, label in zip(paths, _labels(resolved), strict=True)]


def _check(path: Path) -> None:
    mode = mode_of(path)
    if mode and not stat.S_ISDIR(mode):
        raise TrainingError(f"{path}: is a file; name the run's folder")
    if not mode:
        raise TrainingError(f"{path}: no such folder; name the folder of a run (run_dir)")
    names = (METRICS, LAYOUT, SUMMARY, CONFIG, ERROR)
    if not any(stat.S_ISREG(mode_of(path / name)) for name in names):
        raise TrainingError(f"{path}: not the folder of a run: it has none of {', '.join(names)}")


def _labels(paths: Sequence[Path]) -> list[str]:
    """For each path the shortest end, in whole names, that differs from all others' ends."""
    labels = []
    for path in paths:
        others = [other.parts for other in paths if other != path]
        length = next(
            (n for n in range(1, len(path.parts)) if all(other[-n:] != path.parts[-n:] for other in others)),
            len(path.parts),
        )
        labels.append("/".join(path.parts[-length:]) or str(path))
    return labels


def _read(path: Path, label: str, checkpoints: ReadCheckpoints) -> Run:
    notes: list[str] = []
    metrics = _metrics(path / METRICS, notes)
    layout = _json(path / LAYOUT, notes, "the layout is unknown")
    summary = _json(path / SUMMARY, notes, "restarts, checkpoints and time by part are unknown")
    config = _config(path / CONFIG, notes)
    try:
        published = checkpoints(path)
    except OSError as error:
        published = Checkpoints(problem=str(error))
    if published.problem:
        notes.append(f"versions are unknown: {published.problem}")
    return Run(path, label, metrics, layout, summary, config, published, _error(path / ERROR), tuple(notes))


def _metrics(path: Path, notes: list[str]) -> Metrics:
    try:
        metrics = read_metrics(path)
    except FileNotFoundError:
        notes.append(f"{METRICS} is missing: the run has logged nothing yet")
        return Metrics()
    except OSError as error:
        notes.append(f"{METRICS} cannot be read: {error.strerror or error}")
        return Metrics()
    if metrics.damaged:
        lines = "line that is" if metrics.damaged == 1 else "lines that are"
        notes.append(f"{METRICS}: {metrics.damaged} {lines} no complete record, left out")
    if metrics.incomplete:
        notes.append(
            f"{METRICS}: the last line is incomplete, left out (the run is writing, or was killed while it did)"
        )
    if not len(metrics.steps):
        notes.append("no step has been logged yet")
    return metrics


def _json(path: Path, notes: list[str], consequence: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: {consequence}")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({' '.join(str(error).split())}): {consequence}")
        return {}
    if not isinstance(tree, dict):
        notes.append(f"{path.name} is no JSON object: {consequence}")
        return {}
    return tree


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: the settings are unknown")
        return {}
    except (OSError, *UNREADABLE) as error:
        notes.append(f"{path.name} cannot be read ({' '.join(str(error).split())}): the settings are unknown")
        return {}
    if not isinstance(tree, dict):
        notes.append(f"{path.name} contains no settings")
        return {}
    return tree


def _error(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:_MAX_TEXT]
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
