"""Names in a run folder: checkpoints/step-00000004, `latest`, and .tmp-* for what is unfinished."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.portable.manifest import MANIFEST
from recycle_ds.config.atomic_files import TEMPORARY

REPLACED = "replaced-"
"""Name prefix of a checkpoint while another one of the same step takes its place."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_STEP = re.compile(r"^step-(\d{8,})$")


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, None for any other name."""
    match = _STEP.match(folder.name)
    return int(match.group(1)) if match else None


def completed(run_dir: Path) -> list[Path]:
    """Published checkpoints of a run (those renamed into place), newest first."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def remove_unfinished(run_dir: Path) -> None:
    """Deletes unfinished files of a killed run, and restores a checkpoint that it renamed but did not replace."""
    root = run_dir / "checkpoints"
    for replaced in root.glob(f"{REPLACED}*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for path in (*root.glob(f"{TEMPORARY}*"), *run_dir.glob(f"{TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_folder(path: str | Path) -> None:
    """Raises CheckpointError unless a path is a folder. Does not import torch, so that a mistyped path is reported at once."""
    if Path(path).is_dir():
        return
    if Path(path).exists():
        raise CheckpointError(f"{path}: is a file; name its folder")
    advice = ""
    if _HUB_ID.match(str(path)):
        advice = (
            f"; if this is a Hugging Face repository: models are read from local folders only, so download it first "
            f"(`hf download {path} --local-dir models/{Path(path).name}`, needs a network) and name that folder"
        )
    raise CheckpointError(f"{path}: no such folder{advice}")


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint at a path: itself, or the newest of a run folder or checkpoints folder. Raises CheckpointError."""
    check_folder(path)
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return folder
    run_dir = folder.parent if folder.name == "checkpoints" else folder
    found = completed(run_dir)
    if found:
        return found[0]
    raise CheckpointError(f"{path}: no checkpoint there (looked for {MANIFEST}, checkpoints/step-* and config.json)")
