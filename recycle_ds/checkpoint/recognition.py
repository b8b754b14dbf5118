"""Detects the format of a folder of weights by the files in it, and opens it."""

from __future__ import annotations

from pathlib import Path

from recycle_ds.checkpoint.deepspeed_native.files import find_tag
from recycle_ds.checkpoint.deepspeed_native.reading import DeepSpeedSource
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.huggingface.reading import CONFIG, HuggingFaceSource
from recycle_ds.checkpoint.megatron.reading import MegatronSource, is_megatron
from recycle_ds.checkpoint.portable.folders import completed, resolve_checkpoint, run_folder
from recycle_ds.checkpoint.portable.manifest import MANIFEST, read_manifest
from recycle_ds.checkpoint.portable.newest import newest_intact
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.checkpoint.sources import Source


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is in the Hugging Face format: it has config.json, and no manifest of a portable checkpoint.

    transformers' Trainer writes DeepSpeed's files next to config.json: such a folder must have *.safetensors as well.
    """
    if not (folder / CONFIG).is_file() or (folder / MANIFEST).is_file() or completed(folder):
        return False
    return any(folder.glob("*.safetensors")) or find_tag(folder) is None


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder is a DeepSpeed checkpoint, or contains one."""
    return _deepspeed_tag(folder) is not None


def open_source(path: str | Path, *, verify: bool = True, config: str | Path | None = None) -> Source:
    """Opens a run folder, a portable checkpoint, or a Hugging Face, Megatron or DeepSpeed folder. Checksums, if it has any,
    are compared first; with `verify` False that is left to the caller.

    config: the configuration of a source without one of its own (DeepSpeed). Raises CheckpointError for a folder of
    another kind, and for a damaged one."""
    folder = Path(path)
    tag = _deepspeed_tag(folder)
    if tag is not None:
        return DeepSpeedSource(tag, None if config is None else Path(config), verify=verify)
    if config is not None:
        raise CheckpointError(f"--config {config}: only for DeepSpeed folders, and {path} is not one: omit it")
    if is_megatron(folder):
        return MegatronSource(folder, verify=verify)
    if is_hugging_face(folder):
        return HuggingFaceSource(folder, verify=verify)
    checkpoint = resolve_checkpoint(path)
    try:
        return _open_portable(checkpoint, verify)
    except CheckpointError as error:
        if checkpoint == folder:
            raise
        raise CheckpointError(f"{error}; {_intact_one(run_folder(folder), checkpoint)}") from None


def _open_portable(checkpoint: Path, verify: bool) -> PortableSource:
    source = PortableSource(checkpoint, read_manifest(checkpoint))
    if verify:
        source.verify()
    return source


def _intact_one(run_dir: Path, damaged: Path) -> str:
    """Advice for a run whose newest checkpoint is damaged: the newest intact one."""
    others = [folder for folder in completed(run_dir) if folder != damaged]
    try:
        found = newest_intact(others, lambda folder: _open_portable(folder, True), lambda _: None)
    except CheckpointError:
        found = None
    return f"{found[0]} is intact: name that folder" if found else "the run has no intact checkpoint"


def _deepspeed_tag(folder: Path) -> Path | None:
    """The folder of the DeepSpeed checkpoint at a path; None if there is none or the folder is in another format."""
    if (folder / MANIFEST).is_file() or completed(folder) or is_hugging_face(folder):
        return None
    return find_tag(folder)
