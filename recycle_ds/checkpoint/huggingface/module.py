"""The recycle module beside a Hugging Face model: recycle.json and safetensors files of its own, outside the model's own index.

transformers, vLLM and others load the folder as the plain base model and never see it; our commands find it there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import FileEntry, describe, read_json
from recycle_ds.config import ConfigError, RecycleConfig, build_section

MODULE_CONFIG, MODULE_WEIGHTS = "recycle.json", "recycle.safetensors"
_FORMAT = "recycle_ds module"
_ONE_FILE, _FILES = 1, 2
"""Versions: of `file`, which is recycle.safetensors, and of `files` by name."""
_NAME = re.compile(r"recycle(-\d{5}-of-\d{5})?\.safetensors")


def module_file(number: int, count: int) -> str:
    """Name of file `number` (from 1) of `count` with the module's weights."""
    return MODULE_WEIGHTS if count == 1 else f"recycle-{number:05d}-of-{count:05d}.safetensors"


def read_module(folder: Path) -> tuple[RecycleConfig, dict[str, FileEntry]]:
    """The module's configuration and the files with its weights; no layers and no files where the folder has no module.

    Raises CheckpointError for a description that is none.
    """
    path = folder / MODULE_CONFIG
    if not path.is_file():
        stray = sorted(file.name for file in folder.glob("recycle*.safetensors") if _NAME.fullmatch(file.name))
        if stray:
            raise CheckpointError(f"{folder}: {stray[0]} without {MODULE_CONFIG}: copy both, or neither")
        return RecycleConfig(layers=0), {}
    tree = read_json(path)
    version = tree.get("version")
    if tree.get("format") != _FORMAT or type(version) is not int or version not in (_ONE_FILE, _FILES):
        raise CheckpointError(
            f"{path}: format {tree.get('format')!r}, version {version!r}; known is {_FORMAT!r}, {_ONE_FILE} and {_FILES}"
        )
    try:
        recycle = build_section(RecycleConfig, tree.get("recycle") or {})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    files = _read_files(path, {MODULE_WEIGHTS: tree.get("file")} if version == _ONE_FILE else tree.get("files"))
    if not recycle.layers:
        raise CheckpointError(f"{path}: recycle.layers=0: a module has layers; delete the file if there is none")
    return recycle, files


def _read_files(path: Path, listed: Any) -> dict[str, FileEntry]:
    """Size and checksum of every file. Raises CheckpointError."""
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: files={listed!r}: must give bytes and sha256 of every file, by name")
    files = {}
    for name, entry in listed.items():
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {name!r} is not the name of a module's file beside it")
        try:
            files[name] = FileEntry.model_validate(entry)
        except ValueError:
            raise CheckpointError(f"{path}: {name}: {entry!r}: must give bytes and sha256") from None
    return files


def describe_module(
    recycle: RecycleConfig, folder: Path, files: list[str], provenance: dict[str, Any]
) -> dict[str, Any]:
    """Content of recycle.json for weights that are on disk. One file is told as releases that know of one alone read it."""
    entries = {name: describe(folder / name).model_dump() for name in files}
    one = files == [MODULE_WEIGHTS]
    return {
        "format": _FORMAT,
        "version": _ONE_FILE if one else _FILES,
        "recycle": recycle.model_dump(mode="json"),
        **({"file": entries[MODULE_WEIGHTS]} if one else {"files": entries}),
        "provenance": provenance,
    }
