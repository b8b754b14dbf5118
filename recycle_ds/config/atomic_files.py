"""Files that appear whole or not at all: a temporary name beside the target, fsync, rename, fsync of the folder."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""How the name of every unfinished file begins."""
_ABANDONED = 3600.0
"""Seconds without a change after which an unfinished file counts as abandoned."""


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


def remove_abandoned(path: Path) -> None:
    """Removes unfinished files and folders of `path` that a killed process left beside it.

    Its process must have ended on this machine, and nothing in it may have changed for an hour: the process of a
    folder that machines share may run on another one.
    """
    pattern = re.compile(rf"{re.escape(TEMPORARY)}(\d+)-\w+-{re.escape(path.name)}")
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or _runs(int(match[1])):
            continue
        with suppress(OSError):  # another process may be removing it, or it belongs to another user
            found = path.with_name(name)
            newest = max(os.lstat(one).st_mtime for one in (found, *found.rglob("*")))
            if time.time() - newest < _ABANDONED:
                continue
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)
            else:
                found.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


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
