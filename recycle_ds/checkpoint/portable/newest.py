"""Search for the newest intact checkpoint of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from recycle_ds.checkpoint.errors import CheckpointError

T = TypeVar("T")


def newest_intact(
    folders: Sequence[Path],
    open_folder: Callable[[Path], T],
    warn: Callable[[str], None],
    damage: type[Exception] | tuple[type[Exception], ...] = CheckpointError,
) -> tuple[Path, T] | None:
    """The first of `folders` (newest first, see `completed`) that opens, and what `open_folder` returned for it.

    open_folder: reads and verifies a checkpoint; raises `damage` for a damaged one, which is then reported through `warn` and
    skipped. Returns None without folders. Raises CheckpointError if there are folders and all are damaged. Collective if
    `open_folder` is.
    """
    for folder in folders:
        try:
            return folder, open_folder(folder)
        except damage as error:
            warn(f"warning: {folder} is damaged ({error}); falling back to the previous one")
    if folders:
        raise CheckpointError(
            f"{folders[0].parent}: all {len(folders)} checkpoints are damaged; restore one, "
            "or start over in another run_dir"
        )
    return None
