"""The real commands: all launchers train identically, and a signal to any process of a run saves it without leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import read_manifest
from recycle_ds.config import save_config
from tests.launching import PRETRAIN, await_step, deepspeed, finish, mpirun, ranks_of, start, torchrun
from tests.runs import ROOT, figures, make_corpus, steps_of, tiny_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("launch") / "corpus")


def test_launchers_train_identically(corpus: Path, tmp_path: Path) -> None:
    """Prevents a launcher whose ranks do not form one group, or each train alone: its losses would differ."""
    launchers: dict[str, Callable[[], list[str]]] = {"deepspeed": deepspeed, "torchrun": torchrun, "mpirun": mpirun}
    rows = {}
    for name, command in launchers.items():
        folder = tmp_path / name
        code = finish(start(command(), tiny_run(corpus, folder), folder), folder)
        assert code == 0, (folder / "run.log").read_text()
        rows[name] = figures(folder)
    alone = tmp_path / "alone"
    assert finish(start([sys.executable, "-m", PRETRAIN], tiny_run(corpus, alone), alone), alone) == 0
    assert rows["deepspeed"] == rows["torchrun"] == rows["mpirun"]
    for left, right in zip(rows["deepspeed"], figures(alone), strict=True):
        assert left == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("way", ["SIGTERM to one rank", "SIGTERM to the group", "SIGINT to the group, twice"])
def test_a_signal_saves_at_an_agreed_step(corpus: Path, tmp_path: Path, way: str) -> None:
    """Prevents a signal that kills ranks before they save, that only one rank handles, or that leaves ranks running."""
    config = tiny_run(corpus, tmp_path, training__steps=100_000, training__save_every=0)
    process = start(deepspeed(), config, tmp_path)
    await_step(process, tmp_path, 4)
    if way == "SIGTERM to one rank":
        os.kill(ranks_of(tmp_path)[1], signal.SIGTERM)
    elif way == "SIGTERM to the group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
    finish(process, tmp_path, timeout=90)
    deadline = time.monotonic() + 60
    while ranks_of(tmp_path) and time.monotonic() < deadline:  # the launcher may exit before its ranks
        time.sleep(0.05)
    log = (tmp_path / "run.log").read_text()
    assert not ranks_of(tmp_path), log
    saved = completed(tmp_path)
    assert len(saved) == 1, log
    assert read_manifest(saved[0]).step == steps_of(tmp_path)[-1]["step"] >= 4
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    step = steps_of(tmp_path)[-1]["step"]
    config = tiny_run(corpus, tmp_path, training__steps=100_000, training__stop_at=step + 2)
    again = start(deepspeed(), config, tmp_path)
    assert finish(again, tmp_path) == 0, (tmp_path / "run.log").read_text()
    assert [record["step"] for record in steps_of(tmp_path)] == list(range(1, step + 3))


def test_wrong_input_is_one_line(corpus: Path, tmp_path: Path) -> None:
    """Prevents a traceback, or no output, in place of a message with the value and the fix; and half-written files."""
    cases = {
        "training.stps=3": "unknown key, did you mean training.steps?",
        "training.global_batch_size=7": "training.global_batch_size (7)",
        "parallel.tensor=2": "parallel.tensor (2) x parallel.pipeline (1) x parallel.ulysses (1) = 2 must divide the number of",
        "deepspeed=nowhere.json": "no such file",
        "data.tokenizer=nowhere.json": "nowhere.json",
        "init_from=nowhere": "nowhere: no such folder",
    }
    save_config(tiny_run(corpus, tmp_path / "run"), tmp_path / "input.yaml")
    for override, expected in cases.items():
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", PRETRAIN, "--config", str(tmp_path / "input.yaml"), override],
            capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
        )  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1, done.stderr
        assert expected in errors[0]
        assert "Traceback" not in done.stderr + done.stdout
