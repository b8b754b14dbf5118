"""SIGKILL at random operations, most of them during a save: no step before a published checkpoint is lost."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from recycle_ds.checkpoint.portable.folders import completed, step_of
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import RunConfig
from recycle_ds.parallel.peers import PeerLost
from tests.distributed import RankError, run_ranks
from tests.parallel.killing import run_until_killed
from tests.parallel.ranks import run_all
from tests.runs import figures, make_corpus, read_metrics, tiny_run, zero

KILLS = 30 if os.environ.get("RECYCLE_TEST_ALL") == "1" else 6


def config(root: Path, name: str) -> RunConfig:
    """A run that saves every second step, in the background."""
    return tiny_run(
        root / "corpus", root / name, training__steps=4 * KILLS + 8, training__save_every=2, deepspeed=zero(1),
        training__learning_rate=1e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    make_corpus(root / "corpus")
    assert run_ranks(run_all, 2, [config(root, "whole")], timeout=300) == [["finished"]] * 2
    return root


def test_every_resume_is_exact(root: Path) -> None:
    """Prevents a partial checkpoint that counts as complete, one lost at the rename, and steps repeated or skipped."""
    draw = random.Random(KILLS)
    run = config(root, "killed")
    folder = Path(run.run_dir) / "checkpoints"
    moments = []
    resumed: list[int | None] = []
    for number in range(KILLS):
        report = root / f"moment-{number}"
        killed_rank, event, delay = draw.randrange(2), draw.randrange(1, 56), draw.choice([0.0, 0.0, 0.002])
        # the killed rank's exit code, or the other rank's error about the broken connection, whichever comes first
        with pytest.raises((RankError, RuntimeError, PeerLost), match=r"exited with code -9|[Cc]onnection"):
            run_ranks(run_until_killed, 2, run, killed_rank, event, delay, str(report), timeout=200)
        moments.append(report.read_text())
        published = completed(Path(run.run_dir))
        for checkpoint in published:
            open_source(checkpoint)  # verifies its checksums
        resumed.append(step_of(published[0]) if published else None)
    assert run_ranks(run_all, 2, [run], timeout=300) == [["finished"]] * 2
    # no step before a published checkpoint was lost: every start resumed from the newest one
    sessions = json.loads((Path(run.run_dir) / "summary.json").read_text())["sessions"]
    starts = [session["first_step"] for session in sessions]
    newest = [0, *(step or 0 for step in resumed)]
    assert newest == sorted(newest) and newest[-1] >= KILLS // 2
    # a start that was killed before its first step has no session
    assert starts[-1] == newest[-1] and [step for step in newest if step in starts] and set(starts) <= set(newest)
    assert len(starts) > KILLS // 2 and starts == sorted(starts)
    assert [record["step"] for record in read_metrics(run.run_dir) if "loss" in record] == list(
        range(1, run.training.steps + 1)
    )
    assert figures(run.run_dir) == figures(root / "whole"), "bit for bit"
    remaining, expected = (
        sorted(p.name for p in (root / name / "checkpoints").iterdir()) for name in ("killed", "whole")
    )
    assert remaining == expected
    assert not [path for path in Path(run.run_dir).rglob("*") if path.name.startswith(".tmp-")]
    assert not list(folder.rglob("part-*.json"))
    inside = [moment for moment in moments if ".tmp-" in moment]
    assert len(inside) > len(moments) / 2, moments
