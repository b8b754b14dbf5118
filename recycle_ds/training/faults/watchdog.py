"""Finds a run that makes no progress: every rank writes where it stands, the stuck ones are named, and the job ends.

A rank that hangs makes its peers wait in a collective, so all ranks notice. Each has a thread that looks at the time of its
last sign of life. What a rank was doing then tells the culprit: the others have come further, or wait in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

WAITING, WORKING = "waiting for others", "by itself"
HANG_EXIT = 70
"""Exit code of a rank that left because of a hang (EX_SOFTWARE)."""
PHASES = ("starting", "data", "count", "compute", "agree", "update", "log", "save", "evaluate")
"""Of a step, in order."""
_LONG = ("save", "evaluate")
PATIENCE = 4.0
"""How many times longer the first step, saves and evaluations may take."""
_GRACE = 5.0
"""Seconds between a rank's stacks and its end: the others write theirs, and the first one reads them."""


class Watchdog:
    """Watches this rank from `start` to `stop`. timeout: seconds without a sign of life; 0 watches nothing."""

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float) -> None:
        self._folder, self._rank, self._world_size, self._timeout = folder, rank, world_size, timeout
        self._mark = (time.monotonic(), 0, PHASES[0])
        self._limit, self._settled = timeout * PATIENCE, False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        if self._timeout:
            self._mark = (time.monotonic(), 0, PHASES[0])
            self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """A sign of life: the step that is being made, and what is done of it."""
        if phase == PHASES[1] and self._mark[2] != PHASES[0]:
            self._settled = True  # a whole step has been made
        self._limit = self._timeout * (1 if self._settled and phase not in _LONG else PATIENCE)
        self._mark = (time.monotonic(), step, phase)
        if self._timeout and phase in (PHASES[1], *_LONG) and sys.__stderr__ is not None:
            # a native call that never gives the interpreter back stops the thread too, but not this timer, which is C
            faulthandler.dump_traceback_later(self._limit + _GRACE / 2, file=sys.__stderr__)

    def stop(self) -> None:
        """Watches no longer."""
        self._over.set()
        if self._timeout:
            faulthandler.cancel_dump_traceback_later()
            if self._thread.is_alive():
                self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout / 20)):
            since, step, phase = self._mark
            silent = time.monotonic() - since
            if silent > self._limit:
                self._end(step, phase, silent)

    def _end(self, step: int, phase: str, silent: float) -> None:
        folder = self._folder / f"step-{step:08d}"
        state = WAITING if _waits_for_others() else WORKING
        place = f"no progress for {silent:.0f} s in step {step}, {phase}, {state}"
        headline = f"rank {self._rank} on {socket.gethostname()}: {place}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank-{self._rank:05d}.txt").open("w", encoding="utf-8") as file:
                file.write(headline + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"warning: {headline}; its stacks cannot be written: {error}", file=sys.stderr, flush=True)
        faulthandler.cancel_dump_traceback_later()
        # the first rank speaks before any leaves: a launcher ends all at the first one's end
        if self._over.wait(_GRACE / 2) or self._moved_on(step, phase):
            return
        if self._rank == 0:
            try:
                said = _verdict(self._folder, self._world_size, self._limit)
            except OSError as error:
                said = f"hang ({error})"
            print(f"error: {said}; ending the job", file=sys.stderr, flush=True)
        if not self._over.wait(_GRACE / 2) and not self._moved_on(step, phase):
            os._exit(HANG_EXIT)

    def _moved_on(self, step: int, phase: str) -> bool:
        """It was only slow."""
        return self._mark[1:] != (step, phase)


def _waits_for_others() -> bool:
    """Whether the main thread is inside a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    inside = os.path.join("torch", "distributed")
    while frame is not None:
        if inside in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _verdict(folder: Path, world_size: int, limit: float) -> str:
    """Which ranks are behind the others, by what all of them wrote."""
    files = {file: file.stat().st_mtime for file in folder.glob("step-*/rank-*.txt")}
    found = {}
    for file, written in files.items():
        if written < max(files.values()) - limit:  # an earlier hang's: this one has been silent for longer than that
            continue
        line = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        step, phase, state = (*line.rpartition(" in step ")[2].split(", "), "", "")[:3]
        if step.isdigit() and phase in PHASES:
            place = (int(step), PHASES.index(phase), state == WAITING)
            found[int(file.stem.partition("-")[2])] = (place, line)
    return describe_hang(found, world_size) + f"; stacks of all ranks are in {folder}"


def describe_hang(found: dict[int, tuple[tuple[int, int, bool], str]], world_size: int) -> str:
    """A pure function of what ranks wrote: (step, place in PHASES, whether it waits for others) and headline, by rank."""
    silent = sorted(set(range(world_size)) - set(found))
    if silent:
        return f"hang: ranks {_list(silent)} did not even write their stacks"
    first = min(place for place, _ in found.values())
    behind = [rank for rank, (place, _) in sorted(found.items()) if place == first]
    if len(behind) == len(found):
        return f"hang: all ranks stand at the same place ({found[behind[0]][1].partition(': ')[2]})"
    lines = "; ".join(found[rank][1] for rank in behind[:4])
    return f"hang: behind the others: {lines}"


def _list(ranks: Iterable[int]) -> str:
    shown = [str(rank) for rank in ranks]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
