"""Submits the shipped sbatch files, and waits for the jobs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from tests.runs import ROOT, steps_of
from tests.slurm.cluster import Cluster

_INJECT = ROOT / "tests" / "slurm" / "inject"


class Jobs:
    """Jobs of one cluster; their logs and folders are in `root`."""

    def __init__(self, cluster: Cluster, root: Path) -> None:
        self.cluster, self.root = cluster, root
        (root / "logs").mkdir(parents=True, exist_ok=True)

    def submit(
        self,
        script: str,
        *arguments: str,
        options: tuple[str, ...] = (),
        tasks: int = 2,
        nodes: int = 2,
        inject: str = "",
        signal: str = "B:USR1@5",
        **environment: str,
    ) -> str:
        """Submits slurm/SCRIPT and returns the job number. inject: a fault for the ranks, see tests/slurm/inject.
        signal: what SLURM sends before the time limit, "none" for nothing."""
        exported = {"JOBS_DIR": str(self.root / "jobs"), "OMP_NUM_THREADS": "1"} | environment
        if inject:
            exported |= {"PYTHONPATH": str(_INJECT), "INJECT": inject, "INJECT_ONCE": str(self.root / "once")}
            (self.root / "once").mkdir(exist_ok=True)
        sizes = (f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--cpus-per-task=1")
        # the sbatch file requests a signal; CONT replaces it because it has no effect
        warning = ("--signal=B:CONT@1" if signal == "none" else f"--signal={signal}",)
        log = f"--output={self.root}/logs/%j.out"
        exports = ",".join(("--export=ALL", *(f"{name}={value}" for name, value in exported.items())))
        command = ["sbatch", "--parsable", f"--chdir={ROOT}", *sizes, *warning, log, exports, *options]
        return self.cluster.run(*command, str(ROOT / "slurm" / script), *arguments, PWD=str(ROOT)).strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        text = self.cluster.run("scontrol", "show", "job", "--oneliner", job)
        found = re.search(rf"\b{name}=(\S+)", text)
        return found.group(1) if found else ""

    def log(self, job: str) -> str:
        """The output of the job."""
        path = self.root / "logs" / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job: str, timeout: float = 180) -> str:
        """Waits until a job has ended, after any requeues, and returns its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: self.field(job, "JobState") in ended, job, timeout)
        return self.field(job, "JobState")

    def until(self, condition: Callable[[], bool], job: str, timeout: float = 120) -> None:
        """Waits until a condition holds; fails with the job's log after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} ({self.field(job, 'JobState')}):\n{self.log(job)}")
            time.sleep(0.1)

    def until_step(self, run_dir: Path, step: int, job: str) -> None:
        """Waits until a run has logged a step."""
        self.until(lambda: reached(run_dir) >= step, job)


def reached(run_dir: Path) -> int:
    """The last step in a run's metrics; 0 before the first."""
    try:
        records = steps_of(run_dir)
    except (OSError, ValueError):  # does not exist yet, or a line is being written
        return 0
    return int(records[-1]["step"]) if records else 0


def ranks_of(run_dir: Path) -> list[int]:
    """Pids of the ranks of a run, in the order of their SLURM ranks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = dict(
                line.split(b"=", 1) for line in (entry / "environ").read_bytes().split(b"\0") if b"=" in line
            )
        except OSError:
            continue
        launchers = (b"torch.distributed.run", b"deepspeed.launcher.launch", b"slurm/shielded.py")
        is_rank = b"recycle_ds.pretrain" in words and b"python" in Path(os.fsdecode(words[0])).name.encode()
        is_rank = is_rank and not any(name in words for name in launchers)
        if is_rank and f"run_dir={run_dir}".encode() in words:
            found.append((int(variables.get(b"RANK", variables.get(b"SLURM_PROCID", b"0"))), int(entry.name)))
    return [pid for _, pid in sorted(found)]
