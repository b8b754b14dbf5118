"""Whether a checkpoint belongs to the run that is being configured: what makes it the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.portable.manifest import DataIdentity, Manifest
from recycle_ds.config import ModelConfig, RecycleConfig, RunConfig
from recycle_ds.config.resuming import on_resume
from recycle_ds.config.section import OnResume, Section


def check_same_run(config: RunConfig, identity: DataIdentity, manifest: Manifest, folder: Path) -> list[str]:
    """Refuses to resume with another model, data, seed or batch size. Returns notes on other changed settings.

    Data are compared by content, as files may have moved. Raises CheckpointError naming the changed setting.
    """
    if "training" not in manifest.config:
        raise CheckpointError(
            f"{folder}: converted weights without training state; set init_from to it, and use another run_dir"
        )
    if identity.tokenizer != manifest.data.tokenizer:
        raise CheckpointError(
            f"{folder}: cannot resume: data.tokenizer ({config.data.tokenizer}) is not the tokenizer of the run; "
            "restore it, or use another run_dir"
        )
    weights = [source["weight"] for source in manifest.config["data"]["train"]]
    if identity.train != manifest.data.train or weights != [source.weight for source in config.data.train]:
        raise CheckpointError(
            f"{folder}: cannot resume: the token files or weights of data.train are not those of the run; "
            "restore them, or use another run_dir"
        )
    current, saved = _flat(config.model_dump(mode="json")), _defaults() | _flat(manifest.config)
    notes = []
    for key in sorted(current.keys() | saved.keys()):
        kind = _kind(key, config)
        if current.get(key) == saved.get(key) or kind is OnResume.FREE:
            continue
        change = f"{key} was {saved.get(key)!r} and is {current.get(key)!r}"
        if kind is OnResume.FIXED:
            raise CheckpointError(
                f"{folder}: cannot resume: {change}; change it back, or use another run_dir (init_from keeps the weights)"
            )
        notes.append(f"note: resuming with a changed setting: {change}")
    return notes


def _kind(key: str, config: RunConfig) -> OnResume | None:
    if key == "recycle.draft_vocabulary" and config.recycle.draft_vocabulary_in_training:
        return OnResume.FIXED
    return on_resume(key)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, part in tree.items()
        for key, value in _flat(part, f"{prefix}.{name}" if prefix else name).items()
    }


def _defaults() -> dict[str, Any]:
    """Settings of the model and of its module that a run of an older release, which did not have them, was trained with."""
    found: dict[str, Any] = {}
    for name, section in (("model", ModelConfig), ("recycle", RecycleConfig)):
        for key, field in section.model_fields.items():
            if not field.is_required():
                value = field.get_default(call_default_factory=True)
                tree = value.model_dump(mode="json") if isinstance(value, Section) else value
                found |= _flat(list(tree) if isinstance(tree, tuple) else tree, f"{name}.{key}")
    return found
