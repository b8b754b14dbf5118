"""Where the figures of a comparison are written: checked before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from recycle_ds.inference.errors import DecodingError

PLOTS = (".png", ".svg", ".pdf")
"""Suffixes of a plot's formats."""


def check_output(option: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Raises DecodingError unless a file can be written at `path`; folders above it may be missing.

    option: the name of the command's option, without dashes. suffixes: those that the file may have; none for any.
    """
    if path.is_dir():
        raise DecodingError(f"--{option} {path}: is a folder; name a file")
    if suffixes and path.suffix not in suffixes:
        raise DecodingError(f"--{option} {path}: must end in {', '.join(suffixes)}")
    real = Path(os.path.realpath(path))
    above = next(parent for parent in real.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise DecodingError(f"--{option} {path}: {above} is not a folder; name another file")
    try:
        with TemporaryFile(dir=above):  # a superuser may write anywhere, but not in every file system
            pass
    except OSError as error:
        raise DecodingError(
            f"--{option} {path}: {above} is not writable ({error.strerror}); name another file"
        ) from None
