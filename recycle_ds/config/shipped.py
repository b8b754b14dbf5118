"""The configurations that ship with the package, found by name from any working directory."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "ds_configs"
RUNS, DEEPSPEED = "runs", "deepspeed"
_SUFFIXES = {RUNS: ".yaml", DEEPSPEED: ".json"}


def find_config(name: str | os.PathLike[str], kind: str) -> Path:
    """The file that a name or path means: an existing file, else a shipped one of `kind` (RUNS or DEEPSPEED).

    Shipped files are known by name (`demo`, `zero1`) or by their path in the repository (`ds_configs/runs/demo.yaml`). Returns
    `name` as a path where there is neither: opening it then fails.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.name == str(path) and path.suffix != _SUFFIXES[kind]:
        wanted = Path(kind) / f"{path}{_SUFFIXES[kind]}"
    elif path.parts[:1] == (FOLDER,):
        wanted = path.relative_to(FOLDER)
    else:
        return path
    return next((root / wanted for root in _roots() if (root / wanted).is_file()), path)


def names(kind: str) -> list[str]:
    """Names of the shipped configurations of a kind, sorted."""
    found = {file.stem for root in _roots() for file in (root / kind).glob(f"*{_SUFFIXES[kind]}")}
    return sorted(found)


def _roots() -> list[Path]:
    """Where ds_configs may be: in the working directory, or in the package."""
    return [Path(FOLDER), Path(__file__).resolve().parents[1] / FOLDER]
