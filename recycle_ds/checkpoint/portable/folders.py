"""Names in a run folder: checkpoints/step-00000004, `latest`, and unfinished names that start with .tmp-."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.portable.manifest import MANIFEST
from recycle_ds.config.atomic_files import TEMPORARY

REPLACED = "replaced-"
"""How the name of a checkpoint begins while another of the same step takes its place."""
_STEP = re.compile(r"^step-(\d{8,})$")


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Step that a checkpoint folder's name says, None for another name."""
    match = _STEP.match(folder.name)
    return int(match.group(1)) if match else None


def completed(run_dir: Path) -> list[Path]:
    """Checkpoints of a run that were renamed into place, newest first."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def remove_unfinished(run_dir: Path) -> None:
    """Deletes what a killed run left half written, and puts back what it had moved aside and not yet replaced."""
    root = run_dir / "checkpoints"
    for aside in root.glob(f"{REPLACED}*"):
        final = root / aside.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)
    for path in (*root.glob(f"{TEMPORARY}*"), *run_dir.glob(f"{TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a run folder, a checkpoints folder or a checkpoint names. Raises CheckpointError."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if (folder / MANIFEST).is_file():
        return folder
    run_dir = folder.parent if folder.name == "checkpoints" else folder
    found = completed(run_dir)
    if found:
        return found[0]
    raise CheckpointError(f"{path}: no checkpoint there (looked for {MANIFEST}, checkpoints/step-* and config.json)")
