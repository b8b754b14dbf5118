"""Which format a folder is in, by what lies in it."""

from __future__ import annotations

from pathlib import Path

from recycle_ds.checkpoint.files import verify_all
from recycle_ds.checkpoint.folders import completed, find_checkpoint
from recycle_ds.checkpoint.huggingface.reading import CONFIG, HuggingFaceSource
from recycle_ds.checkpoint.manifest import MANIFEST, read_manifest
from recycle_ds.checkpoint.reading import PortableSource
from recycle_ds.checkpoint.sources import Source


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is Hugging Face's: it has config.json, and no manifest of ours."""
    return (folder / CONFIG).is_file() and not (folder / MANIFEST).is_file() and not completed(folder)


def open_source(path: str | Path, *, verify: bool = True) -> Source:
    """Opens a run folder, a checkpoint or a Hugging Face folder; checksums, where there are any, are compared first (`verify`
    False leaves that to the caller).

    Raises CheckpointError for what is none of these or is damaged.
    """
    folder = Path(path)
    if is_hugging_face(folder):
        return HuggingFaceSource(folder)
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    if verify:
        verify_all(checkpoint, manifest.files)
    return PortableSource(checkpoint, manifest)
