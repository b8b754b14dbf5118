"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

TEMPORARY = ".tmp-"
"""How the name of every unfinished file begins."""


def temporary_name(path: Path) -> Path:
    """A name beside `path` for the unfinished file; unique, so that two writers of one path never share it."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def publish(temporary: Path, path: Path) -> None:
    """Flush `temporary` to disk and give it its final name, replacing an older file; flush the rename too."""
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def publish_together(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Give several temporary files their final names as nearly at once as a file system allows.

    The last one vouches for the others: its older version is removed first and the new one arrives last, so files that
    do not belong together are never vouched for. If this fails midway, the new files that arrived are removed.

    Args:
        pairs: temporary and final path of each file, all in one folder.
    """
    for temporary, _ in pairs:
        flush(temporary)
    arrived: list[Path] = []
    try:
        pairs[-1][1].unlink(missing_ok=True)
        for temporary, path in pairs:
            os.replace(temporary, path)
            arrived.append(path)
        flush(pairs[-1][1].parent)
    except BaseException:  # Ctrl-C too
        for path in arrived:
            path.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str) -> None:
    """Write a small UTF-8 file through a temporary name, which is removed if anything goes wrong, Ctrl-C included."""
    temporary = temporary_name(path)
    try:
        temporary.write_text(content, encoding="utf-8")
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Force a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
