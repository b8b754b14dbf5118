"""JSON files and checksums of a checkpoint's files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from recycle_ds.checkpoint.errors import CheckpointError


class FileEntry(BaseModel):
    """Size and checksum of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError if the file is missing, unreadable or something else."""
    try:
        tree = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    # ValueError: not UTF-8, not JSON, or an integer with more digits than Python parses
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not a {type(tree).__name__}")
    return tree


def describe(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def verify(folder: Path, name: str, entry: FileEntry) -> str | None:
    """Compares a file with its size and checksum. Returns the problem in words, or None."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{name} has {size} bytes instead of {entry.bytes}"
        return None if describe(path) == entry else f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def verify_all(folder: Path, files: dict[str, FileEntry]) -> None:
    """Compares every file. Raises CheckpointError listing the first problems."""
    problems = [problem for name, entry in files.items() if (problem := verify(folder, name, entry))]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{folder}: {'; '.join(problems[:3])}{more}")
