"""The manifest of a checkpoint: its tensors, where they are stored, and the checksum of every file. Validated before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import FileEntry, read_json
from recycle_ds.config.atomic_files import write_json_atomically

MANIFEST = "manifest.json"
FORMAT = "recycle_ds checkpoint"
VERSION = 2

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
"""A file name without separators, so that nothing outside the folder can be read."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Slice(_Record):
    """`length` rows from `start` along `axis` of one kind of one canonical tensor, stored under `key` in `file`."""

    kind: Literal["weight", "exp_avg", "exp_avg_sq"]
    file: FileName
    key: str
    axis: Annotated[int, Field(ge=0)]
    start: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(gt=0)]


class TensorEntry(_Record):
    """A canonical tensor: its full shape, and the slices that tile it."""

    shape: list[Annotated[int, Field(gt=0)]]
    slices: list[Slice]


class DataIdentity(_Record):
    """The data of a run, by content: its tokenizer, and the tokens, documents and SHA-256 of each training file in order."""

    tokenizer: str
    train: list[dict[str, int | str]]


class _Weighted(BaseModel):
    weight: float


class _Data(BaseModel):
    train: list[_Weighted]


class _Training(BaseModel):
    seed: int
    seq_length: Annotated[int, Field(gt=0)]


class _RunConfig(BaseModel):
    """The settings that a resume needs before it compares the rest; other keys may differ between releases."""

    model_config = ConfigDict(strict=True)
    data: _Data
    training: _Training


class Manifest(_Record):
    """Everything about a checkpoint except the values of its tensors."""

    format: Literal["recycle_ds checkpoint"]
    version: Literal[2]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the rest of the manifest: see `digest_of`."""
    step: Annotated[int, Field(ge=0)]
    next_sample: Annotated[int, Field(ge=0)]
    skipped: Annotated[int, Field(ge=0)]
    rollbacks: Annotated[int, Field(ge=0)]
    recent: list[Annotated[list[float], Field(min_length=2, max_length=2)]]
    """Loss and gradient norm of the last applied steps, for spike detection; empty if it is off."""
    adam_step: Annotated[int, Field(ge=0)]
    config: dict[str, Any]
    data: DataIdentity
    layout: dict[str, int]
    provenance: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[FileName, FileEntry]


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a manifest: its schema, that slices are in listed files, and that they tile every tensor exactly.

    Raises CheckpointError.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}: not a checkpoint, or an unfinished one")
    tree = read_json(path)
    if tree.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a manifest of a {FORMAT}")
    if tree.get("version") == 1 and "digest" not in tree:
        tree = _upgrade(tree)
    if tree.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {tree.get('version')!r}; this release reads versions 1 and {VERSION}")
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_error(error)}") from None
    if manifest.digest != digest_of(tree):
        raise CheckpointError(f"{path}: does not match its own digest: it was changed or damaged")
    _check_config(path, manifest.config)
    for name, entry in manifest.tensors.items():
        _check_tensor(path, name, entry, manifest.files)
    return manifest


def digest_of(tree: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a manifest's canonical JSON without its digest."""
    content = {key: value for key, value in tree.items() if key != "digest"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _upgrade(tree: dict[str, Any]) -> dict[str, Any]:
    """Converts a manifest of release 0.1, which had no digest and no rollbacks, to the current version."""
    upgraded = {"rollbacks": 0, "recent": [], **tree, "version": VERSION}
    return {**upgraded, "digest": digest_of(upgraded)}


def write_manifest(folder: Path, tree: Mapping[str, Any]) -> None:
    """Adds the digest to a manifest and writes it to disk."""
    # as it will be read back: JSON turns tuples into lists
    plain = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **tree}))
    write_json_atomically(folder / MANIFEST, {**plain, "digest": digest_of(plain)})


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Checks that a run's configuration has what a resume needs. Without a training section it is weights only."""
    if "training" not in config:
        return
    try:
        _RunConfig.model_validate(config)
    except ValidationError as error:
        raise CheckpointError(f"{path}: config.{_first_error(error)}") from None


def _check_tensor(path: Path, name: str, entry: TensorEntry, files: dict[str, FileEntry]) -> None:
    kinds: dict[str, list[Slice]] = {}
    for piece in entry.slices:
        if piece.file not in files:
            raise CheckpointError(f"{path}: {name} is stored in {piece.file!r}, which is not among the listed files")
        if piece.axis >= len(entry.shape):
            raise CheckpointError(f"{path}: {name}: axis {piece.axis} of a tensor of shape {entry.shape}")
        kinds.setdefault(piece.kind, []).append(piece)
    if "weight" not in kinds:
        raise CheckpointError(f"{path}: {name} has no weight")
    for kind, slices in kinds.items():
        if len({piece.axis for piece in slices}) != 1:
            raise CheckpointError(f"{path}: {kind} of {name} is split along more than one axis")
        end = 0
        for piece in sorted(slices, key=lambda piece: piece.start):
            if piece.start != end:
                raise CheckpointError(
                    f"{path}: {kind} of {name}: rows {end} to {piece.start} are missing or duplicated"
                )
            end = piece.start + piece.length
        if end != entry.shape[slices[0].axis]:
            raise CheckpointError(f"{path}: {kind} of {name}: {end} rows instead of {entry.shape[slices[0].axis]}")


def slice_shape(entry: TensorEntry, piece: Slice) -> tuple[int, ...]:
    """Shape that the stored tensor of a slice must have."""
    return tuple(piece.length if axis == piece.axis else size for axis, size in enumerate(entry.shape))
