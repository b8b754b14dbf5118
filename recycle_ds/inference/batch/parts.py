"""Partial outputs of a file of prompts: one file for each process, in one folder beside the output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from recycle_ds.config.atomic_files import TEMPORARY, temporary_name


def part_of(parts: Path, rank: int, world_size: int) -> Path:
    """The part file of a process."""
    return parts / f"part-{rank:05d}-of-{world_size:05d}.jsonl"


def completed_lines(parts: Path) -> dict[int, dict[str, Any]]:
    """Completed lines of all parts, by prompt index. Skips lines that a kill has cut off."""
    found: dict[int, dict[str, Any]] = {}
    for part in sorted(parts.glob("part-*.jsonl")):
        for line in part.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # damaged by a crash of the machine
                continue
            if isinstance(record, dict) and isinstance(record.get("index"), int):
                found[record["index"]] = record
    return found


def drop_partial_line(part: Path) -> None:
    """Removes an incomplete last line left by a kill: the next line would be appended to it."""
    if part.is_file():
        content = part.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            with part.open("r+b") as file:
                file.truncate(len(complete))


def remove_parts(parts: Path) -> None:
    """Renames the folder first: other processes would mistake a partly deleted folder for valid parts."""
    aside = temporary_name(parts)
    try:
        os.rename(parts, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(*paths: Path) -> None:
    """Removes what processes that were killed while they wrote or removed these paths have left beside them.

    Only for paths that are final: a process that is still writing one finds its unfinished file removed.
    """
    names = "|".join(re.escape(path.name) for path in paths)
    unfinished = re.compile(rf"{re.escape(TEMPORARY)}\d+-[0-9a-f]+-(?:{names})")
    for left in list(paths[0].parent.iterdir()):
        if unfinished.fullmatch(left.name):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink()
