"""Where an artefact came from: versions, command, revision of the code."""

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
    """The commit that the package's folder is a checkout of, with -dirty where tracked files differ from it.

    None where the folder above is not the top of a checkout: a package that is installed inside some project's folder is no
    part of that project's history.
    """
    above = (package or Path(recycle_ds.__file__).parent).resolve().parent
    top = _git(above, "rev-parse", "--show-toplevel")
    revision = _git(above, "rev-parse", "HEAD")
    if not top or not revision or Path(top).resolve() != above:
        return None
    changed = _git(above, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}-dirty" if changed else revision


def _git(folder: Path, *command: str) -> str | None:
    """What git says, None where it fails or is not there."""
    # nothing that a caller's environment says of another repository counts, and no index is rewritten on the way
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command],
            capture_output=True, text=True, timeout=10, check=False, env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
