"""Runs tools/self_generate.py in a rank of a test, watches its file operations, and kills or overtakes it at one."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recycle_ds.inference.self_text.command import main

_WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def watched(rank: int, world_size: int, arguments: list[str]) -> tuple[tuple[int, str], list[str]]:
    """Runs the command. Returns also the paths of its file operations in the output folder."""
    operations: list[str] = []
    end = self_generate(rank, world_size, arguments, operations.append)
    return end, operations


def is_final(path: str) -> bool:
    """Whether an operation belongs to the last phase of a job, in which the output is written."""
    return Path(path).name.endswith("-output")


def killed(rank: int, world_size: int, arguments: list[str], number: int, final: bool) -> None:
    """Runs the command, and kills it by SIGKILL at a file operation, from 0, of the job or of its final phase."""
    done = 0

    def operation(path: str) -> None:
        nonlocal done
        if done or not final or is_final(path):
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    end = self_generate(rank, world_size, arguments, operation)
    raise AssertionError(f"not killed at operation {number}: only {done}, {end}")


def overtaken(rank: int, world_size: int, arguments: list[str], number: int, flags: Path) -> tuple[int, str]:
    """Two starts of the command. The first one stops at a file operation of its final phase until the other one has ended."""
    _leave_launcher()
    paused, ended = flags / "paused", flags / "ended"
    if rank:
        _wait_for(paused)
        end = self_generate(rank, world_size, arguments)
        ended.touch()
        return end
    done = 0

    def operation(path: str) -> None:
        nonlocal done
        if done or is_final(path):
            done += 1
            if done == number + 1:
                paused.touch()
                _wait_for(ended)

    end = self_generate(rank, world_size, arguments, operation)
    assert paused.exists(), f"only {done} operations"
    return end


def _wait_for(flag: Path) -> None:
    end = time.monotonic() + 60
    while not flag.exists():
        assert time.monotonic() < end, f"{flag} does not appear"
        time.sleep(0.02)


def alone(rank: int, world_size: int, arguments: list[str]) -> tuple[int, str]:
    """Runs the command as a process that no launcher has started."""
    _leave_launcher()
    return self_generate(rank, world_size, arguments)


def _leave_launcher() -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def self_generate(
    rank: int, world_size: int, arguments: list[str], operation: Callable[[str], object] | None = None
) -> tuple[int, str]:
    """Runs the command. Returns its exit code and its error. operation: called before each file operation in the output."""
    if operation is not None:
        folder = arguments[arguments.index("--output") + 1]

        def watch(name: str, args: tuple[Any, ...]) -> None:
            if name in _WATCHED and str(args[0]).startswith(folder):
                operation(str(args[0]))

        sys.addaudithook(watch)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            main(arguments)
    except SystemExit as end:
        found = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
        return int(end.code or 0), "\n".join(found)
    raise AssertionError("main always exits")
