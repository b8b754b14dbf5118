"""A hang is detected, every rank's stack traces are written, and the rank that blocks the others is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from recycle_ds.training.faults.watchdog import HANG_EXIT, describe_hang
from tests.runs import ROOT

STUCK = """
import sys, time
from pathlib import Path
from recycle_ds.training.faults.watchdog import Watchdog
from recycle_ds.training.observers import PhaseStart, RunEnd, RunStart, StepStart
def stand_still():
    {hang}
dog = Watchdog(Path(sys.argv[1]), 0, 1, 0.4)
dog.at_start(RunStart(None, None, 0, 3))
for step in range(1, 4):
    dog.before_step(StepStart(step, step))
    dog.at_phase(PhaseStart(step, "data"))
    time.sleep(0.2)
    dog.at_phase(PhaseStart(step, "compute"))
{then}
dog.at_end(RunEnd(3, "finished", 3))
print("done")
"""


def run(tmp_path: Path, hang: str, then: str) -> subprocess.CompletedProcess[str]:
    code = STUCK.format(hang=hang, then=then)
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hangs")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )


def test_a_hang_ends_the_process_and_is_located(tmp_path: Path) -> None:
    """Prevents a stuck rank from occupying its node until the time limit without leaving a stack trace."""
    done = run(tmp_path, "time.sleep(600)", "stand_still()")
    assert done.returncode == HANG_EXIT and "done" not in done.stdout
    text = (tmp_path / "hangs" / "step-00000003" / "rank-00000.txt").read_text()
    assert "in step 3, compute, not in a collective" in text.partition("\n")[0] and "in stand_still" in text
    assert "ending the job" in done.stderr


def test_a_slow_run_is_not_a_hang(tmp_path: Path) -> None:
    """Prevents ending a run because it is slow, or after its last step."""
    done = run(tmp_path, "pass", "stand_still()")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert not (tmp_path / "hangs").exists()


LIMITS = """
import sys
from pathlib import Path
from recycle_ds.training.faults.watchdog import Watchdog
from recycle_ds.training.observers import PhaseStart, StepStart
dog = Watchdog(Path(sys.argv[1]), 0, 1, 100.0)
for number, step in enumerate((5, 5, 6), start=1):
    dog.before_step(StepStart(step, number))
    for phase in ("data", "count", "compute", "save"):
        dog.at_phase(PhaseStart(step, phase))
        print(dog._limit)
"""


def test_only_the_first_step_and_saves_may_take_longer(tmp_path: Path) -> None:
    """Prevents a start that is ended in its first step, which compiles: the dry run before it counted as a step."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITS, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.split() == ["400.0"] * 4 + ["100.0", "100.0", "100.0", "400.0"] * 2


def test_the_rank_behind_the_others_is_named() -> None:
    """Prevents a report that names the rank that waits instead of the rank that it waits for."""
    ahead = ((5, 3, True), "rank 0 on a: no progress for 9 s in step 5, compute, waiting in a collective")
    stuck = ((5, 1, False), "rank 1 on b: no progress for 9 s in step 5, data, not in a collective")
    assert describe_hang({0: ahead, 1: stuck, 2: ahead}, 3) == f"hang: ranks behind the others: {stuck[1]}"
    same = ((5, 3, False), "rank 2 on c: no progress for 9 s in step 5, compute, not in a collective")
    assert describe_hang({0: ahead, 1: ahead, 2: same}, 3) == f"hang: ranks behind the others: {same[1]}"
    assert "all ranks are at the same point (no progress for 9 s in step 5" in describe_hang({0: ahead, 1: ahead}, 2)
    assert "ranks 1, 3 wrote no stack traces" in describe_hang({0: ahead, 2: ahead}, 4)
