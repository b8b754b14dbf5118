"""Provenance of an artefact: package versions, command line and git revision of the code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import recycle_ds

_PACKAGES = ("torch", "deepspeed", "megatron-core", "safetensors", "tokenizers")


def provenance() -> dict[str, Any]:
    """Versions, command line, git revision (None outside a checkout of this package) and time of this process."""
    return {
        "recycle_ds": recycle_ds.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _revision(),
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _revision(package: Path | None = None) -> str | None:
    """Commit of the checkout that contains the package, with the suffix -dirty if tracked files were modified.

    None if the package's parent folder is not the top level of a checkout: a package installed inside another project (for
    example in its virtual environment) is not part of that project's history.
    """
    parent = (package or Path(recycle_ds.__file__).parent).resolve().parent
    top_level = _git(parent, "rev-parse", "--show-toplevel")
    revision = _git(parent, "rev-parse", "HEAD")
    if not top_level or not revision or Path(top_level).resolve() != parent:
        return None
    changed = _git(parent, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}-dirty" if changed else revision


def _git(folder: Path, *command: str) -> str | None:
    """Output of a git command; None if it fails or git is not installed."""
    # GIT_* variables may point to another repository; without optional locks git does not rewrite the index
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *command],
            capture_output=True, text=True, timeout=10, check=False, env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
