"""A folder that is either made whole or not at all, and its errors told in one line."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from recycle_ds.checkpoint.errors import CheckpointError

# Two libraries hide the system's error: torch's zip writer counts what arrived, tokenizers raises plain Exception.
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter|unexpected pos|iostream error")
_SYSTEM = re.compile(r"([^:]*) \(os error \d+\)")


def check_target(path: str | Path) -> Path:
    """Where a new folder will lie, links resolved. Raises CheckpointError for what is not free: before any work is done."""
    try:
        target = Path(os.path.realpath(path))
        if target.exists():
            if not target.is_dir() or any(target.iterdir()):
                raise CheckpointError(f"{path}: already exists; name a folder that does not, or remove it")
            if os.path.samefile(target, "."):
                raise CheckpointError(
                    f"{path}: is the folder that this runs in, which would be replaced under you: name one below it"
                )
    except OSError as error:
        raise _cannot(path, _reason(error)) from None
    return target


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder of a temporary name to fill, renamed to `path` at the end of the `with`; removed if that is not reached.

    The body writes; what it reads it must tell the errors of itself. Raises CheckpointError for a target that is not free, and
    for one that cannot be written (no room, no permission, no such place).
    """
    target = check_target(path)
    # beside the target: renaming moves it in one step
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    made = [parent for parent in target.parents if not os.path.lexists(parent)]
    done = False
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, target)
        done = True
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise _cannot(path, reason) from None
    finally:
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()


def _cannot(path: str | Path, reason: str | None) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written ({reason}); nothing is left there")


def _reason(error: Exception) -> str | None:
    """Why writing failed; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())
    told = _SYSTEM.search(str(error))
    if isinstance(error, SafetensorError) or (told and type(error) is Exception):
        return told.group(1).strip() if told else " ".join(str(error).split())
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error)):
        cause = error.__context__
        return (
            cause.strerror if isinstance(cause, OSError) and cause.strerror else "no room, or a limit on files' sizes"
        )
    return None
