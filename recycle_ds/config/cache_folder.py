"""The folder for what a later start can use again: measured costs, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/recycle_ds`, by default `~/.cache/recycle_ds`; it may not exist yet. None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recycle_ds"
    except RuntimeError:
        return None
