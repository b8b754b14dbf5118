"""The recycle module beside a Hugging Face model: recycle.json and recycle.safetensors, outside the model's own index.

transformers, vLLM and others load the folder as the plain base model and never see it; our commands find it there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files import FileEntry, describe, read_json, verify
from recycle_ds.config import ConfigError, RecycleConfig, build_section

MODULE_CONFIG, MODULE_WEIGHTS = "recycle.json", "recycle.safetensors"
_FORMAT, _VERSION = "recycle_ds module", 1


def read_module(folder: Path) -> RecycleConfig:
    """The module's configuration; of no layers where the folder has no module. Raises CheckpointError for a damaged one."""
    path = folder / MODULE_CONFIG
    if not path.is_file():
        if (folder / MODULE_WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: {MODULE_WEIGHTS} without {MODULE_CONFIG}: copy both, or neither")
        return RecycleConfig(layers=0)
    tree = read_json(path)
    if tree.get("format") != _FORMAT or tree.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: format {tree.get('format')!r}, version {tree.get('version')!r}; known is {_FORMAT!r}, {_VERSION}"
        )
    try:
        recycle = build_section(RecycleConfig, tree.get("recycle") or {})
        entry = FileEntry.model_validate(tree.get("file"))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except ValueError:
        raise CheckpointError(f"{path}: file={tree.get('file')!r}: must give bytes and sha256") from None
    if not recycle.layers:
        raise CheckpointError(f"{path}: recycle.layers=0: a module has layers; delete the file if there is none")
    fault = verify(folder, MODULE_WEIGHTS, entry)
    if fault is not None:
        raise CheckpointError(f"{folder}: {fault}; copy it anew")
    return recycle


def describe_module(recycle: RecycleConfig, weights: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """Content of recycle.json for weights that are on disk."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "recycle": recycle.model_dump(mode="json"),
        "file": describe(weights).model_dump(),
        "provenance": provenance,
    }
