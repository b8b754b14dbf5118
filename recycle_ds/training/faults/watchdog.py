"""Detects hangs: every rank writes its stack traces, the stuck ranks are named, and the job ends.

A rank that hangs makes its peers wait in a collective, so all ranks time out. On each, a thread checks the time since the last
heartbeat. The culprit is the rank that is behind: the others are in a later phase, or wait in a collective.
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
from typing import get_args

from recycle_ds.training.observers import Observer, PhaseStart, RunEnd, RunStart, StepStart
from recycle_ds.training.observers.records import Phase

WAITING, WORKING = "waiting in a collective", "not in a collective"
HANG_EXIT = 70
"""Exit code of a rank that exits because of a hang (EX_SOFTWARE)."""
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Phases of a step, in order."""
_LONG_PHASES = ("save", "evaluate")
PATIENCE = 4.0
"""Factor on the timeout for the first step, saves and evaluations."""
_GRACE = 5.0
"""Seconds between writing the stack traces and exiting: the other ranks write theirs, and rank 0 reads them."""


class Watchdog(Observer):
    """Watches this rank during the run. Every phase of a step is a heartbeat. timeout: seconds without one; 0 disables it."""

    every_rank = True
    on_error = "raise"

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float) -> None:
        self._folder, self._rank, self._world_size, self._timeout = folder, rank, world_size, timeout
        self._last_beat = (time.monotonic(), 0, PHASES[0])
        self._limit, self._warmed_up = timeout * PATIENCE, False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at_start(self, start: RunStart) -> None:
        """Starts to watch."""
        if self._timeout:
            self._last_beat = (time.monotonic(), 0, PHASES[0])
            self._thread.start()

    def before_step(self, start: StepStart) -> None:
        """The first step may take longer."""
        self._warmed_up = start.number > 1

    def at_phase(self, phase: PhaseStart) -> None:
        """Heartbeat."""
        self._beat(phase.step, phase.phase)

    def _beat(self, step: int, phase: Phase) -> None:
        self._limit = self._timeout * (1 if self._warmed_up and phase not in _LONG_PHASES else PATIENCE)
        self._last_beat = (time.monotonic(), step, phase)
        if self._timeout and phase in (PHASES[1], *_LONG_PHASES) and sys.__stderr__ is not None:
            # a native call that never releases the GIL blocks the thread too, but not this timer, which runs in C
            faulthandler.dump_traceback_later(self._limit + _GRACE / 2, file=sys.__stderr__)

    def at_end(self, end: RunEnd) -> None:
        """Stops to watch."""
        self._stopped.set()
        if self._timeout:
            faulthandler.cancel_dump_traceback_later()
            if self._thread.is_alive():
                self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout / 20)):
            last, step, phase = self._last_beat
            elapsed = time.monotonic() - last
            if elapsed > self._limit:
                self._end(step, phase, elapsed)

    def _end(self, step: int, phase: str, elapsed: float) -> None:
        folder = self._folder / f"step-{step:08d}"
        state = WAITING if _waits_for_others() else WORKING
        problem = f"no progress for {elapsed:.0f} s in step {step}, {phase}, {state}"
        headline = f"rank {self._rank} on {socket.gethostname()}: {problem}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank-{self._rank:05d}.txt").open("w", encoding="utf-8") as file:
                file.write(headline + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"warning: {headline}; its stack traces cannot be written: {error}", file=sys.stderr, flush=True)
        faulthandler.cancel_dump_traceback_later()
        # rank 0 prints the error before any rank exits: a launcher ends all ranks when one exits
        if self._stopped.wait(_GRACE / 2) or self._moved_on(step, phase):
            return
        if self._rank == 0:
            try:
                cause = _diagnose(self._folder, self._world_size, self._limit)
            except OSError as error:
                cause = f"hang ({error})"
            print(f"error: {cause}; ending the job", file=sys.stderr, flush=True)
        if not self._stopped.wait(_GRACE / 2) and not self._moved_on(step, phase):
            os._exit(HANG_EXIT)

    def _moved_on(self, step: int, phase: str) -> bool:
        """Whether there has been a heartbeat since: the rank was only slow."""
        return self._last_beat[1:] != (step, phase)


def _waits_for_others() -> bool:
    """Whether the main thread is inside a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    inside = os.path.join("torch", "distributed")
    while frame is not None:
        if inside in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _diagnose(folder: Path, world_size: int, limit: float) -> str:
    """Names the ranks that are behind the others, from the files that all ranks wrote."""
    files = {file: file.stat().st_mtime for file in folder.glob("step-*/rank-*.txt")}
    found = {}
    for file, written in files.items():
        if written < max(files.values()) - limit:  # from an earlier hang: this one has lasted longer than the limit
            continue
        line = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        step, phase, state = (*line.rpartition(" in step ")[2].split(", "), "", "")[:3]
        if step.isdigit() and phase in PHASES:
            position = (int(step), PHASES.index(phase), state == WAITING)
            found[int(file.stem.partition("-")[2])] = (position, line)
    return describe_hang(found, world_size) + f"; stack traces of all ranks are in {folder}"


def describe_hang(found: dict[int, tuple[tuple[int, int, bool], str]], world_size: int) -> str:
    """Names the ranks that are behind. found: (step, index in PHASES, whether in a collective) and headline, by rank. Pure."""
    missing = sorted(set(range(world_size)) - set(found))
    if missing:
        return f"hang: ranks {_list(missing)} wrote no stack traces"
    first = min(position for position, _ in found.values())
    behind = [rank for rank, (position, _) in sorted(found.items()) if position == first]
    if len(behind) == len(found):
        return f"hang: all ranks are at the same point ({found[behind[0]][1].partition(': ')[2]})"
    lines = "; ".join(found[rank][1] for rank in behind[:4])
    return f"hang: ranks behind the others: {lines}"


def _list(ranks: Iterable[int]) -> str:
    shown = [str(rank) for rank in ranks]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
