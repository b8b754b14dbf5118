"""Record of a parts folder: the prompts, settings and checkpoint that all processes and later starts must share."""

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
"""File name of the record in a parts folder. The folder is created together with its record."""
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".distcp")
_CONFIG_FILES = ("config.json", "tokenizer.json")
# Number of blocks and bytes per block read of a larger file, evenly spaced. Training changes all tensors, so samples suffice.
_BLOCKS, _BLOCK = 256, 2**16


@dataclass(frozen=True)
class PartsRecord:
    """The prompts, settings and checkpoint with which a folder of partial outputs was created."""

    key: str
    """SHA-256 of the prompts and the settings."""
    asked: str
    """Absolute path of --model. It may be a run folder, whose newest checkpoint changes."""
    checkpoint: str
    """Absolute path of the checkpoint that was loaded from it."""
    digest: str
    """See `checkpoint_digest`."""

    def matches(self, key: str, model: str) -> bool:
        """Whether a request may continue with these parts: same key, and `model` is the same path or the checkpoint."""
        return key == self.key and model in (self.asked, self.checkpoint)

    @property
    def portable(self) -> bool:
        """Whether the checkpoint folder is self-contained. Other formats may have their tokenizer in a parent folder."""
        return Path(self.checkpoint, MANIFEST).is_file()


def read_record(path: Path) -> PartsRecord | None:
    """Reads a record; None if the file does not exist. Raises DecodingError for an invalid file."""
    try:
        return PartsRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not written by this release"
        raise DecodingError(f"{path}: cannot be read ({reason}): remove it and its parts to start over") from None


def write_record(path: Path, record: PartsRecord) -> None:
    """Writes a record, replacing an older one."""
    write_atomically(path, json.dumps(asdict(record)) + "\n")


def claim(parts: Path, record: PartsRecord) -> bool:
    """Creates the parts folder with its record, atomically. Returns False if another process has created it already. Raises
    DecodingError where no folder can be created."""
    temporary = temporary_name(parts)
    try:
        temporary.mkdir()
    except (
        FileNotFoundError,
        NotADirectoryError,
        PermissionError,
    ) as error:  # not a full disk, which may have room later
        raise DecodingError(f"{parts}: cannot be created ({error.strerror}); name another --output") from None
    try:
        try:
            write_record(temporary / RECORD, record)
            os.rename(temporary, parts)  # never replaces a folder that is not empty
        except FileNotFoundError:  # removed by a process that has completed the output
            return False
        except OSError:
            if parts.is_dir():
                return False
            raise
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checkpoint_digest(folder: Path) -> str:
    """Digest that distinguishes checkpoints with the same path: the manifest's digest, which covers all checksums. Without a
    manifest, the SHA-256 of samples of the weights, the configuration and the tokenizer; unlike modification times, it is the
    same on every node.

    Raises DecodingError for files that cannot be read, and CheckpointError for a damaged manifest.
    """
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).digest
    total = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in _WEIGHT_SUFFIXES or path.name in _CONFIG_FILES:
                total.update(f"{path.name} {path.stat().st_size}\n".encode())
                for block in _samples(path):
                    total.update(block)
    except OSError as error:
        raise DecodingError(f"{folder}: cannot be read ({error.strerror or error})") from None
    return total.hexdigest()


def _samples(path: Path) -> list[bytes]:
    """The complete content of a small file; evenly spaced blocks of a larger one, including the first and the last."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _BLOCKS * _BLOCK:
            return [file.read()]
        found = []
        for number in range(_BLOCKS):
            file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
            found.append(file.read(_BLOCK))
        return found
