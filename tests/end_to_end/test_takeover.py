"""SLURM requeues a job while its first start still runs, on a node that only the controller cannot reach."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.config import RunConfig
from tests.launching import await_step, finish, ranks_of, start, torchrun
from tests.runs import figures, make_corpus, tiny_run

STEPS = 1200


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all files of a run, except the output of the two starts."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".log"
    }


def between_saves(run: Path) -> bool:
    """Whether no checkpoint is being written or published; a start stopped during a save would finish it later."""
    folder = run / "checkpoints"
    newest = [path.name for path in completed(run)[:1]]
    return not list(folder.glob(".tmp-*")) and newest == (folder / "latest").read_text().split()


def test_an_earlier_start_writes_nothing_after_a_takeover(tmp_path: Path) -> None:
    """Prevents mixed files of two starts: a checkpoint with the other start's manifest, or a log with steps of both."""
    corpus = make_corpus(tmp_path / "corpus")

    def config(name: str, steps: int) -> RunConfig:
        return tiny_run(
            corpus, tmp_path / name, training__steps=STEPS, training__stop_at=steps, training__save_every=4,
            training__learning_rate=1e-3,
        )  # fmt: skip

    run = tmp_path / "run"
    earlier = start(torchrun(), config("run", STEPS), run, "earlier.log", SLURM_JOB_ID="77")
    try:
        await_step(earlier, run, 9)
        while not between_saves(run):
            time.sleep(0.001)
        ranks = ranks_of(run)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        last = len(figures(run)) + 8
        later = start(torchrun(), config("run", last), run, "later.log", SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")
        assert finish(later, run) == 0, (run / "later.log").read_text()
        after = contents(run)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        assert finish(earlier, run) != 0
    finally:
        if earlier.poll() is None:
            os.killpg(earlier.pid, signal.SIGKILL)
            for pid in ranks_of(run):
                os.kill(pid, signal.SIGKILL)
    log = (run / "earlier.log").read_text()
    assert f"error: {run} has been taken over by process" in log and "(job 77)" in log, log
    assert not ranks_of(run)
    assert contents(run) == after
    uninterrupted = tmp_path / "uninterrupted"
    assert finish(start(torchrun(), config("uninterrupted", last), uninterrupted), uninterrupted) == 0
    assert figures(run) == figures(uninterrupted) and len(figures(run)) == last
