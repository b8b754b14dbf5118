"""Runs parts as processes, side by side or one after the other. None outlives its time limit or the check's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recycle_ds.gpu_check.part import FAILED, NOT_RUN, PASSED, TIMED_OUT, Checked, Part, Result

_KEPT_LINES = 25
_GRACE = 1.0
"""Seconds in which a process that is out of time may write its stack traces."""
_POLL = 0.05


@dataclass
class _Running:
    """A part under way."""

    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    limit: float
    expired: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


@dataclass
class PartRunner:
    """Runs parts in `folder` (the repository's root) with an environment, until `deadline` of time.monotonic().

    on_result: called as each part ends.
    """

    folder: Path
    environment: Mapping[str, str]
    deadline: float
    on_result: Callable[[Result], None]
    _running: list[_Running] = field(default_factory=list)

    def run(self, parts: Sequence[Part], jobs: int) -> None:
        """Runs the parts, at most `jobs` at once. Ctrl-C and any other exception end those that are under way."""
        left = list(parts)
        try:
            while left or self._running:
                while left and len(self._running) < jobs:
                    self._start(left.pop(0))
                time.sleep(_POLL)
                self._end([one for one in self._running if one.process.poll() is None and one.seconds > one.limit])
                for one in list(self._running):
                    if one.process.poll() is not None:
                        self._running.remove(one)
                        _kill_group(one.process)  # what the part itself has left behind
                        self.on_result(_result(one))
        finally:
            for one in self._running:
                _kill_group(one.process)
                one.process.wait()
            self._running.clear()

    def _start(self, part: Part) -> None:
        limit = min(part.seconds, self.deadline - time.monotonic())
        if limit <= 0:
            self.on_result(Result(part.name, NOT_RUN, output=("the time of the check was used up before it",)))
            return
        part.results.parent.mkdir(parents=True, exist_ok=True)
        part.results.unlink(missing_ok=True)
        log = part.results.with_suffix(".log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *part.command],
                cwd=self.folder,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append(_Running(part, process, log, time.monotonic(), limit))

    @staticmethod
    def _end(expired: Sequence[_Running]) -> None:
        """Asks for the stack traces of parts that are out of time, and kills them with all their processes."""
        for one in expired:
            one.expired = True
            with contextlib.suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGUSR2)  # see `announce`
        end = time.monotonic() + _GRACE  # for all of them: the check has little time left
        for one in expired:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(end - time.monotonic(), 0))
            _kill_group(one.process)
            one.process.wait()


def announce() -> None:
    """In the process of a part: SIGUSR2 prints the stacks of all threads, so that a hang names its place. (A run handles
    SIGUSR1 itself.)"""
    import faulthandler

    faulthandler.register(signal.SIGUSR2, all_threads=True)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _result(one: _Running) -> Result:
    """From the exit code and from what the part has written."""
    lines = _lines(one.part.results)
    figures: dict[str, Any] = {}
    expected: list[str] = []
    found: list[Checked] = []
    for line in lines:
        figures |= line.get("figures", {})
        expected += line.get("expected", [])
        if "test" in line:
            found.append(Checked(line["test"], line["state"], line["seconds"], line["message"]))
    missing = [name for name in expected if name not in {test.name for test in found}]
    found += [Checked(name, TIMED_OUT if one.expired and name == missing[0] else NOT_RUN) for name in missing]
    good = one.process.returncode == 0 and all(test.state == PASSED for test in found)
    state = TIMED_OUT if one.expired else PASSED if good else FAILED
    text = one.log.read_text(encoding="utf-8", errors="replace").splitlines()
    output = () if state == PASSED else tuple(text[-_KEPT_LINES:])
    return Result(one.part.name, state, one.seconds, one.limit, tuple(found), figures, output)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a results file; the last one may be cut."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
