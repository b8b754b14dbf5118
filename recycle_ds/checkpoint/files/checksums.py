"""Files that are either whole or absent: temporary names, fsync, rename, checksums."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config.atomic_files import flush as fsync


class FileEntry(BaseModel):
    """Size and checksum of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        tree = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    # ValueError: text of another coding, no JSON, or a number of more digits than Python reads
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not a {type(tree).__name__}")
    return tree


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Writes JSON and forces it to disk; the name appears only once it is whole."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(tree, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """The same for a line of text."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors as safetensors and forces them to disk, readable for whom the umask says: the library's files are not."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(mode)
    fsync(path)


def describe(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def verify(folder: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a file of a checkpoint, or None."""
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
    """Checks every file. Raises CheckpointError with the first faults."""
    faults = [fault for name, entry in files.items() if (fault := verify(folder, name, entry))]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{folder}: {'; '.join(faults[:3])}{more}")
