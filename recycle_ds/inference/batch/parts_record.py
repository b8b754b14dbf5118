"""What a folder of parts was begun with: every start and every process goes on with the same checkpoint, or is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from recycle_ds.checkpoint.portable.manifest import MANIFEST, read_manifest
from recycle_ds.config.atomic_files import temporary_name, write_atomically
from recycle_ds.inference.errors import DecodingError

RECORD = "key"
"""Name of the record in a folder of parts, which never exists without it."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".distcp")
_BESIDE = ("config.json", "tokenizer.json")
# Of a larger file this many blocks are read, evenly spaced: training changes all of a model's tensors.
_BLOCKS, _BLOCK = 256, 2**16


@dataclass(frozen=True)
class Begun:
    """Which prompts, settings and checkpoint parts are of."""

    key: str
    """SHA-256 of the prompts and the settings."""
    asked: str
    """Absolute path that --model named: a run perhaps, which has another newest checkpoint by now."""
    checkpoint: str
    """Absolute path of the checkpoint that was found there."""
    digest: str
    """See `digest_of`."""

    def serves(self, key: str, model: str) -> bool:
        """Whether a request for `model` may go on with it: the same one, or one that names the checkpoint itself."""
        return key == self.key and model in (self.asked, self.checkpoint)

    @property
    def portable(self) -> bool:
        """Whether the checkpoint is a folder that is complete by itself; other formats may have a tokenizer above it."""
        return Path(self.checkpoint, MANIFEST).is_file()


def read_begun(path: Path) -> Begun | None:
    """None where there is no record. Raises DecodingError for a file that is none."""
    try:
        return Begun(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not written by this release"
        raise DecodingError(f"{path}: cannot be read ({reason}): remove it and its parts, and begin anew") from None


def write_begun(path: Path, begun: Begun) -> None:
    """Writes a record, replacing an older one."""
    write_atomically(path, json.dumps(asdict(begun)) + "\n")


def claim(parts: Path, mine: Begun) -> bool:
    """Makes a folder of parts with its record in it. False where another process was quicker."""
    temporary = temporary_name(parts)
    temporary.mkdir()
    try:
        write_begun(temporary / RECORD, mine)
        try:
            os.rename(temporary, parts)  # a folder that is not empty is never replaced
        except OSError:
            if parts.is_dir():
                return False
            raise
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def digest_of(folder: Path) -> str:
    """What tells a checkpoint from another of the same name: its manifest's digest, which covers all checksums; without one, a
    digest of samples of its weights, and of its configuration and tokenizer. The same on every node, unlike times of files.

    Raises DecodingError, and CheckpointError for a manifest that is damaged.
    """
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).digest
    total = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in _WEIGHTS or path.name in _BESIDE:
                total.update(f"{path.name} {path.stat().st_size}\n".encode())
                for block in _samples(path):
                    total.update(block)
    except OSError as error:
        raise DecodingError(f"{folder}: cannot be read ({error.strerror or error})") from None
    return total.hexdigest()


def _samples(path: Path) -> list[bytes]:
    """All of a small file; of a larger one its first and last block, and some between."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _BLOCKS * _BLOCK:
            return [file.read()]
        found = []
        for number in range(_BLOCKS):
            file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
            found.append(file.read(_BLOCK))
        return found
