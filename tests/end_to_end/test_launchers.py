"""Runs started by launchers: a signal to any process saves the run and leaves no process, and an error is one line.

test_documents.py checks that all launchers train identically.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import read_manifest
from recycle_ds.config import save_config
from recycle_ds.parallel.job import SAVED_FOR_RESTART
from tests.distributed import run_ranks
from tests.launching import PRETRAIN, await_step, deepspeed, finish, ranks_of, start, torchrun
from tests.parallel.ranks import run_all
from tests.runs import ROOT, make_corpus, steps_of, tiny_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("launch") / "corpus")


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
    assert run_ranks(run_all, 2, [config]) == [["stop_at"]] * 2
    assert [record["step"] for record in steps_of(tmp_path)] == list(range(1, step + 3))


@pytest.mark.parametrize(("in_job", "code"), [(False, 130), (True, 0)])
def test_ctrl_c_is_not_success(corpus: Path, tmp_path: Path, in_job: bool, code: int) -> None:
    """Prevents `pretrain && next` from continuing after Ctrl-C; a job's shell is told the outcome in a file instead."""
    config = tiny_run(corpus, tmp_path, training__steps=100_000)
    variables = {"RECYCLE_JOB_DIR": str(tmp_path / "job")} if in_job else {}
    (tmp_path / "job").mkdir()
    process = start([sys.executable, "-W", "ignore", "-m", PRETRAIN], config, tmp_path, **variables)
    await_step(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    assert finish(process, tmp_path, timeout=90) == code, (tmp_path / "run.log").read_text()
    assert read_manifest(completed(tmp_path)[0]).step == steps_of(tmp_path)[-1]["step"]
    if in_job:
        assert (tmp_path / "job" / "outcome").read_text().strip() == SAVED_FOR_RESTART


def test_wrong_input_is_one_line(corpus: Path, tmp_path: Path) -> None:
    """Prevents a traceback, or no output, instead of a message with the value and the fix."""
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


def test_the_cause_is_not_buried_under_a_launchers_traceback(corpus: Path, tmp_path: Path) -> None:
    """Prevents dozens of lines of the launcher or of gloo after the line that has the cause of an error."""
    config = tiny_run(corpus, tmp_path / "run")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        command = deepspeed()
        command[command.index("--master_port") + 1] = str(port)
        process = start(command, config, tmp_path)
        assert finish(process, tmp_path) != 0
    lines = (tmp_path / "run.log").read_text().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and f"port {port} of 127.0.0.1 is in use" in errors[0] and "--master_port N" in errors[0]
    assert not [line for line in lines if "Traceback" in line] and len(lines) - lines.index(errors[0]) < 6, lines
    process = start([*torchrun(), "training.stps=3"], config, tmp_path / "torchrun")
    assert finish(process, tmp_path / "torchrun") != 0
    cause = "error: training.stps=3: unknown key, did you mean training.steps?"
    lines = (tmp_path / "torchrun" / "run.log").read_text().splitlines()
    assert lines[0] == cause and lines[-2].endswith(cause), lines
