"""Starts runs as a user does, with a launcher's command, each in its own process session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from recycle_ds.config import save_config
from tests.distributed import free_port
from tests.runs import ROOT, steps_of

PRETRAIN = "recycle_ds.pretrain"


def deepspeed() -> list[str]:
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    return [*runner, "--module", PRETRAIN]


def torchrun() -> list[str]:
    runner = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return [*runner, "-m", PRETRAIN]


def start(
    command: list[str], config: Any, folder: Path, log: str = "run.log", **variables: str
) -> subprocess.Popen[str]:
    """Starts a run in its own process session. log: file for its output. variables: added to its environment."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "input.yaml")
    with (folder / log).open("w") as output:
        return subprocess.Popen(
            [*command, "--config", str(folder / "input.yaml")],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], folder: Path, timeout: float = 180) -> int:
    """The exit code. A run that does not end in time is killed with all its ranks, and the test fails with its log."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        for pid in ranks_of(folder):  # torchrun starts each rank in its own session
            os.kill(pid, signal.SIGKILL)
        raise AssertionError(logs(folder)) from None


def logs(folder: Path) -> str:
    """The output of all starts of a run."""
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*.log")))


def await_step(process: subprocess.Popen[str], folder: Path, steps: int, timeout: float = 120) -> None:
    """Waits until the run has logged `steps` steps."""
    deadline = time.monotonic() + timeout
    while not (folder / "metrics.jsonl").exists() or len(steps_of(folder)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, logs(folder)
        time.sleep(0.05)


def ranks_of(folder: Path) -> list[int]:
    """Process IDs of the ranks of the run in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            is_rank = PRETRAIN.encode() in words and b"deepspeed.launcher" not in b" ".join(words)
            if is_rank and str(folder / "input.yaml").encode() in words:
                found.append(int(entry.name))
    return sorted(found)
