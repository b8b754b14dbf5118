"""Files that appear whole or not at all: a temporary name beside the target, fsync, rename, fsync of the folder."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""How the name of every unfinished file begins."""


def write_atomically(path: Path, content: str) -> None:
    """Writes a small UTF-8 file. The temporary file is removed if anything goes wrong, Ctrl-C included. Raises OSError."""
    temporary = temporary_name(path)
    try:
        temporary.write_text(content, encoding="utf-8")
        publish(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a failed write has no name, and the temporary one means nothing to a user
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomically(path: Path, tree: Mapping[str, Any], indent: int = 1) -> None:
    """Writes a JSON object, as `write_atomically` does. Raises OSError."""
    write_atomically(path, json.dumps(tree, indent=indent) + "\n")


def temporary_name(path: Path) -> Path:
    """A name beside `path` for the unfinished file; unique, so that two writers of one path never share it."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def publish(temporary: Path, path: Path) -> None:
    """Forces `temporary` to disk and gives it its final name, replacing an older file; forces the rename to disk too."""
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def publish_together(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Gives several temporary files their final names, as nearly at once as a file system allows.

    pairs: temporary and final path of each file, all in one folder. The last file vouches for the others: its older
    version is removed first and the new one arrives last, so files that do not belong together are never vouched for.
    If this fails midway, the new files that arrived are removed. Raises OSError."""
    for temporary, _ in pairs:
        fsync(temporary)
    arrived: list[Path] = []
    try:
        pairs[-1][1].unlink(missing_ok=True)
        for temporary, path in pairs:
            os.replace(temporary, path)
            arrived.append(path)
        fsync(pairs[-1][1].parent)
    except BaseException:  # Ctrl-C too
        for path in arrived:
            path.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    """Forces a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
