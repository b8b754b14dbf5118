"""A run whose process kills itself at a chosen operation on the checkpoints folder."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from recycle_ds.config import RunConfig
from tests.parallel.ranks import run_all

_WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")


def run_until_killed(
    rank: int, world_size: int, config: RunConfig, killed_rank: int, event: int, delay: float, report: str
) -> list[str]:
    """Like `run_all` for one configuration. Rank `killed_rank` kills itself by SIGKILL, `delay` seconds after its
    `event`-th operation on the checkpoints folder in a save, and writes that operation to the file `report`."""
    folder = os.path.join(config.run_dir, "checkpoints")
    count = 0

    def die(operation: str) -> None:
        with open(report, "w") as file:
            file.write(operation)
        os.kill(os.getpid(), signal.SIGKILL)

    def die_later(operation: str) -> None:
        time.sleep(delay)
        die(operation)

    def watch(name: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if name not in _WATCHED or not any(isinstance(arg, str) and arg.startswith(folder) for arg in map(_text, args)):
            return
        if threading.current_thread() is threading.main_thread() and not _saving():
            return
        count += 1
        if count == event:
            operation = f"{name} {_text(args[0])}"
            if delay:
                threading.Thread(target=die_later, args=(operation,), daemon=True).start()
            else:
                die(operation)

    if rank == killed_rank:
        sys.addaudithook(watch)
    return run_all(rank, world_size, [config])


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _saving() -> bool:
    """Whether this thread is saving a checkpoint: reads of the folder at the start of a run do not count."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith(("checkpoint/run/saving.py", "checkpoint/run/shard_writer.py")):
            return True
        frame = frame.f_back
    return False
