"""Which format a folder is in, by what lies in it."""

from __future__ import annotations

from pathlib import Path

from recycle_ds.checkpoint.deepspeed_native.files import find_tag
from recycle_ds.checkpoint.deepspeed_native.reading import DeepSpeedSource
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.huggingface.reading import CONFIG, HuggingFaceSource
from recycle_ds.checkpoint.megatron.reading import MegatronSource, is_megatron
from recycle_ds.checkpoint.portable.folders import completed, find_checkpoint
from recycle_ds.checkpoint.portable.manifest import MANIFEST, read_manifest
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.checkpoint.sources import Source


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is Hugging Face's: it has config.json, and no manifest of ours.

    transformers' trainer puts DeepSpeed's files beside config.json: then weights of Hugging Face's must be there too.
    """
    if not (folder / CONFIG).is_file() or (folder / MANIFEST).is_file() or completed(folder):
        return False
    return any(folder.glob("*.safetensors")) or find_tag(folder) is None


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder is DeepSpeed's, or names one."""
    return _deepspeed_tag(folder) is not None


def open_source(path: str | Path, *, verify: bool = True, config: str | Path | None = None) -> Source:
    """Opens a run folder, a checkpoint, a Hugging Face, Megatron or DeepSpeed folder; checksums, where there are any, are
    compared first (`verify` False leaves that to the caller).

    config: the configuration of a source that does not hold its own (DeepSpeed's). Raises CheckpointError for what is none of
    these or is damaged.
    """
    folder = Path(path)
    tag = _deepspeed_tag(folder)
    if tag is not None:
        return DeepSpeedSource(tag, None if config is None else Path(config), verify=verify)
    if config is not None:
        raise CheckpointError(f"--config {config}: only DeepSpeed's folders need one, and {path} is none: leave it out")
    if is_megatron(folder):
        return MegatronSource(folder, verify=verify)
    if is_hugging_face(folder):
        return HuggingFaceSource(folder, verify=verify)
    checkpoint = find_checkpoint(path)
    source = PortableSource(checkpoint, read_manifest(checkpoint))
    if verify:
        source.verify()
    return source


def _deepspeed_tag(folder: Path) -> Path | None:
    """The folder with DeepSpeed's files that a path names, unless it is a folder of another format."""
    if (folder / MANIFEST).is_file() or completed(folder) or is_hugging_face(folder):
        return None
    return find_tag(folder)
