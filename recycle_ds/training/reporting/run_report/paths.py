"""What a path of the command line names."""

from __future__ import annotations

from pathlib import Path

from recycle_ds.training.errors import TrainingError


def mode_of(path: Path) -> int:
    """The `st_mode` of what a path names, symbolic links followed; 0 if there is nothing.

    Raises TrainingError if that cannot be found out: a name that is too long, a folder that may not be read.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}; name another path") from None
