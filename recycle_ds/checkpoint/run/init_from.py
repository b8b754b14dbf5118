"""Settings that a run with `init_from` takes from the folder it starts from: a retrofit need not repeat the model's shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recycle_ds.checkpoint.portable.folders import check_model_folder, completed
from recycle_ds.config import RecycleConfig

_INHERITED = ("layers", "depth", "draft_vocabulary", "taps", "confidence")
"""Settings of the recycle module that a run takes from the folder."""


def init_from_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults for a tree of settings, see `load_config`. Empty without `init_from`.

    They are the model's shape, its tokenizer, and the module's layers, taps, depth and draft vocabulary if the folder has it.
    A run that has a checkpoint takes them from its own config.yaml, since the folder may be gone by then. Raises
    CheckpointError for a folder that does not exist or cannot be read.
    """
    folder = tree.get("init_from")
    if not isinstance(folder, str):
        return {}
    run_dir = tree.get("run_dir")
    # before its first checkpoint, the folder decides
    if isinstance(run_dir, str) and (completed(Path(run_dir)) or not Path(folder).is_dir()):
        earlier = _earlier_start(tree)
        if earlier is not None:
            return earlier
    check_model_folder(folder)
    from recycle_ds.checkpoint.recognition import open_source  # torch, which takes seconds to import

    source = open_source(folder, verify=False)
    found: dict[str, Any] = {"model": source.model.model_dump(mode="json")}
    if source.recycle.layers:
        settings = source.recycle.model_dump(mode="json")
        found["recycle"] = {key: settings[key] for key in _INHERITED}
    if source.tokenizer is not None:
        found["data"] = {"tokenizer": str(source.tokenizer)}
    return found


def _earlier_start(tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same settings as an earlier start of the run resolved them, if it had the same init_from."""
    run_dir = tree.get("run_dir")
    if not isinstance(run_dir, str):
        return None
    try:
        saved = yaml.safe_load((Path(run_dir) / "config.yaml").read_text(encoding="utf-8"))
        if saved["init_from"] != tree["init_from"]:
            return None
        recycle = {key: saved["recycle"].get(key, RecycleConfig.model_fields[key].default) for key in _INHERITED}
        tokenizer = saved["data"]["tokenizer"]
        if not Path(tokenizer).exists():  # every checkpoint has a copy
            kept = [folder / "tokenizer.json" for folder in completed(Path(run_dir))]
            tokenizer = next((str(file) for file in kept if file.is_file()), tokenizer)
        return {"model": saved["model"], "recycle": recycle, "data": {"tokenizer": tokenizer}}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # no earlier start, or another kind of file
        return None
