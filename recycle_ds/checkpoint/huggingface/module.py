"""The recycle module next to a Hugging Face model: recycle.json and safetensors files that the model's index does not list.

transformers, vLLM and others load the folder as the plain base model and ignore the module; our commands load both.
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
"""Format versions: 1 describes one `file`, recycle.safetensors; 2 describes `files` by name."""
_LATER: dict[str, Any] = {
    "step_weights": None,
    "taps": [],
    "objective": "cross_entropy",
    "draft_vocabulary_in_training": False,
    "confidence": False,
}
"""Settings that older releases refuse, with the defaults that are left out for their sake."""
_NAME = re.compile(r"recycle(-\d{5}-of-\d{5})?\.safetensors")


def module_file(number: int, count: int) -> str:
    """Returns the name of weight file `number` (from 1) of `count`."""
    return MODULE_WEIGHTS if count == 1 else f"recycle-{number:05d}-of-{count:05d}.safetensors"


def read_module(folder: Path) -> tuple[RecycleConfig, dict[str, FileEntry]]:
    """Returns the module's configuration and its weight files; no layers and no files if the folder has no module.

    Raises CheckpointError for an invalid recycle.json, and for weight files without one.
    """
    path = folder / MODULE_CONFIG
    if not path.is_file():
        stray = sorted(file.name for file in folder.glob("recycle*.safetensors") if _NAME.fullmatch(file.name))
        if stray:
            raise CheckpointError(f"{folder}: {stray[0]} without {MODULE_CONFIG}: copy both files, or neither")
        return RecycleConfig(layers=0), {}
    tree = read_json(path)
    version = tree.get("version")
    if tree.get("format") != _FORMAT or type(version) is not int or version not in (_ONE_FILE, _FILES):
        raise CheckpointError(
            f"{path}: format {tree.get('format')!r}, version {version!r}; must be {_FORMAT!r} and {_ONE_FILE} or {_FILES}"
        )
    try:
        recycle = build_section(RecycleConfig, tree.get("recycle") or {})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    files = _read_files(path, {MODULE_WEIGHTS: tree.get("file")} if version == _ONE_FILE else tree.get("files"))
    if not recycle.layers:
        raise CheckpointError(
            f"{path}: recycle.layers=0: must be at least 1; delete the file if the model has no module"
        )
    return recycle, files


def _read_files(path: Path, listed: Any) -> dict[str, FileEntry]:
    """Returns size and checksum of every weight file. Raises CheckpointError for an invalid list."""
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path}: files={listed!r}: must give bytes and sha256 of every file, by name")
    files = {}
    for name, entry in listed.items():
        if not _NAME.fullmatch(name):
            raise CheckpointError(
                f"{path}: {name!r}: must be {MODULE_WEIGHTS} or recycle-NNNNN-of-NNNNN.safetensors, in the same folder"
            )
        try:
            files[name] = FileEntry.model_validate(entry)
        except ValueError:
            raise CheckpointError(f"{path}: {name}: {entry!r}: must give bytes and sha256") from None
    return files


def recycle_settings(recycle: RecycleConfig) -> dict[str, Any]:
    """Returns the settings for recycle.json. Older releases refuse unknown keys, so defaults of later ones are left out."""
    settings = recycle.model_dump(mode="json")
    return {key: value for key, value in settings.items() if key not in _LATER or value != _LATER[key]}


def describe_module(
    recycle: RecycleConfig, folder: Path, files: list[str], provenance: dict[str, Any]
) -> dict[str, Any]:
    """Returns the content of recycle.json for weights on disk. One file is described as version 1, for older releases."""
    entries = {name: describe(folder / name).model_dump() for name in files}
    single = files == [MODULE_WEIGHTS]
    return {
        "format": _FORMAT,
        "version": _ONE_FILE if single else _FILES,
        "recycle": recycle_settings(recycle),
        **({"file": entries[MODULE_WEIGHTS]} if single else {"files": entries}),
        "provenance": provenance,
    }
