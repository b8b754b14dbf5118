"""Atomic creation of a folder (complete or not at all), with write errors reported in one line."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.config.atomic_files import fsync, temporary_name

# Two libraries hide the OS error: torch's zip writer reports a wrong byte count, tokenizers raises a plain Exception.
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter|unexpected pos|iostream error")
_OS_ERROR = re.compile(r"([^:]*) \(os error \d+\)")


def check_target(path: str | Path) -> Path:
    """Path of a new folder, links resolved. Raises CheckpointError, before any work is done, if the path cannot be used."""
    try:
        target = Path(os.path.realpath(path))
        if target.exists():
            if not target.is_dir() or any(target.iterdir()):
                raise CheckpointError(f"{path}: already exists; name a new folder, or remove it")
            if os.path.samefile(target, "."):
                raise CheckpointError(
                    f"{path}: is the current working directory, which would be replaced: name a folder below it"
                )
    except OSError as error:
        raise _write_error(path, _failed_write(error)) from None
    except ValueError as error:  # a name with a NUL character
        if isinstance(error, CheckpointError):
            raise
        raise _write_error(path, str(error)) from None
    return target


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder, which is renamed to `path` at the end of the `with` block, and removed after an error.

    An OSError in the block is reported as a failed write, so the block must handle errors of what it reads itself. Raises
    CheckpointError if the target exists or cannot be written (disk full, no permission, invalid path).
    """
    target = check_target(path)
    # next to the target, so that the rename is atomic
    temporary = temporary_name(target)
    created = [parent for parent in target.parents if not os.path.lexists(parent)]
    completed = False
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, target)
        fsync(target.parent)
        completed = True
    except Exception as error:
        reason = _failed_write(error)
        if reason is None:
            raise
        raise _write_error(path, reason) from None
    finally:
        if not completed:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in created:
                with suppress(OSError):
                    parent.rmdir()


def _write_error(path: str | Path, reason: str | None) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written ({reason}); nothing is left there")


def _failed_write(error: Exception) -> str | None:
    """Why writing failed; None if the error is not a failed write."""
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())
    os_error = _OS_ERROR.search(str(error))
    if isinstance(error, SafetensorError) or (os_error and type(error) is Exception):
        return os_error.group(1).strip() if os_error else " ".join(str(error).split())
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error)):
        cause = error.__context__
        return cause.strerror if isinstance(cause, OSError) and cause.strerror else "disk full, or a file size limit"
    return None
