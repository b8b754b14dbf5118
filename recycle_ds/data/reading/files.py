"""Which files of a folder hold documents."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from pathlib import Path

from recycle_ds.data.errors import DataError
from recycle_ds.data.reading.packings import READABLE, kind
from recycle_ds.data.reading.report import ReadingOptions, ReadReport, kind_of

# Files that describe a data set: the card of a hub's repository, licences, and the JSON of the `datasets` library.
_CARD = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|contributing|code_of_conduct|security)([._-]\w+)?\.(md|txt)"
    r"|dataset_(info|infos|dict)\.json|state\.json|croissant\.json",
    re.IGNORECASE,
)
_HIDDEN_FOLDERS = ("__MACOSX", "__pycache__")


def saved_splits(folder: Path) -> tuple[str, ...] | None:
    """Whether `Dataset.save_to_disk` made a folder: the names of the splits, () for a data set without, None for others."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return ()
    try:
        content = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))
        return tuple(map(str, content["splits"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def files_of(folder: Path, options: ReadingOptions, report: ReadReport) -> list[Path]:
    """Files, and folders of saved data sets, of a folder and the folders inside, in sorted order.

    What is not read is counted in `report`: hidden files, dataset cards, links to folders, empty files, and other kinds of
    files. Raises DataError if nothing is left.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        here = Path(place)
        if here != folder and saved_splits(here) is not None:
            folders.clear()
            if not _excluded(here, folder, options, report):
                found.append(here)
            continue
        for name in sorted(folders):
            if (here / name).is_symlink():
                report.leave_out("links to folders, which are not followed", _place(here / name, folder) + "/")
            elif is_hidden(name) and not options.all_files:
                folders.remove(name)
                inside = sum(len(files) for _, _, files in os.walk(here / name))
                if inside:
                    report.leave_out("hidden", _place(here / name, folder) + "/", inside)
        found += [here / name for name in sorted(names) if _is_read(here / name, folder, options, report)]
    if not found:
        reasons = "; ".join(f"{reason}: {entry}" for reason, entry in report.left_out.items())
        found_others = f" (left out: {reasons})" if reasons else ""
        raise DataError(f"the folder {folder} contains no readable file{found_others}; give {READABLE}")
    return sorted(found)


def _is_read(file: Path, folder: Path, options: ReadingOptions, report: ReadReport) -> bool:
    place = _place(file, folder)
    if is_hidden(file.name) and not options.all_files:
        report.leave_out("hidden", place)
    elif _CARD.fullmatch(file.name) and not options.all_files:
        report.leave_out("dataset cards and licences (--all-files reads them)", place)
    elif kind(file.name) is None:
        report.leave_out(f"of a kind that is not read, {kind_of(file.name)}", place)
    elif _excluded(file, folder, options, report):
        return False
    elif not file.exists():
        report.leave_out("broken links", place)
    elif not file.is_file():
        report.leave_out("neither file nor folder", place)
    elif not file.stat().st_size:
        report.leave_out("empty", place)
    else:
        return True
    return False


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out if not all files are read."""
    return name.startswith(".") or name in _HIDDEN_FOLDERS


def _excluded(path: Path, folder: Path, options: ReadingOptions, report: ReadReport) -> bool:
    place = _place(path, folder)
    if any(fnmatch.fnmatch(place, pattern) or fnmatch.fnmatch(path.name, pattern) for pattern in options.exclude):
        report.leave_out("by --exclude", place)
        return True
    return False


def _place(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _unreadable(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}; allow it, or name another folder")
