"""Where a report is written, and what it must not overwrite."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.reporting.run_report.paths import mode_of

NAME = "report.html"
MARKER = "<!-- recycle_ds run report -->"
"""In the second line of every report."""


def output_file(folders: Sequence[Path], output: str | None) -> Path:
    """The file of the report: `output`, by default report.html in the folder of the one run, or in the current directory.

    Raises TrainingError for a folder, another kind of file than .html, a file that is not a report, and what cannot be read.
    """
    path = Path(output) if output is not None else Path(folders[0], NAME) if len(folders) == 1 else Path(NAME)
    mode = mode_of(path)
    if stat.S_ISDIR(mode):
        raise TrainingError(f"--output {path}: is a folder; name a file, such as {path / NAME}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise TrainingError(f"--output {path}: the report is HTML; name a file that ends in .html")
    # opening a FIFO would wait for a writer
    if mode and (not stat.S_ISREG(mode) or not _is_report(path)):
        raise TrainingError(f"{path}: exists and is not a report; name another file with --output")
    return path


def _is_report(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return MARKER in file.read(1000)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror}); name another file with --output") from None


def write_report(path: Path, html: str) -> None:
    """Writes the report, completely or not at all. Raises TrainingError if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, html)
    except FileExistsError:
        raise TrainingError(f"{path}: {path.parent} is a file, not a folder; name another file with --output") from None
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error.strerror}); name another file with --output") from None
