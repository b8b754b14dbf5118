"""Where an artefact came from: versions, command, revision of the code."""

from __future__ import annotations

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
    """Versions, command line, git revision (None outside a checkout) and time of this process."""
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


def _revision() -> str | None:
    here = Path(recycle_ds.__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
