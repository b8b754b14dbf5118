"""SLURM's variables of a task that srun started. Pure functions of the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PORTS = range(10_000, 30_000)


def started_by_srun(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of an srun step (and not a child of a launcher that srun started)."""
    return "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def has_own_gpus(environment: Mapping[str, str]) -> bool:
    """Whether SLURM has bound GPUs to a task that no other task may use, however they were requested.

    Not with --gpu-bind=none. Where SLURM does not restrict devices (cgroups), a task can see more GPUs than its own.
    """
    bind = environment.get("SLURM_GPU_BIND", "")
    if "none" in bind.split(","):  # may start with "verbose,"
        return False
    requested = environment.get("SLURM_GPUS_PER_TASK") or environment.get("SLURM_NTASKS_PER_GPU")
    bound = bind.startswith("per_task")
    return bool(requested) or bound or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")


def tasks_on_host(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node, from SLURM_STEP_TASKS_PER_NODE ("4(x2),3") and SLURM_NODEID; 0 if unknown."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return 0
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 0


def master_endpoint(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of the rendezvous: MASTER_ADDR and MASTER_PORT, or else the step's first node and a port that depends on
    job, step and restart."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    port = environment.get("MASTER_PORT", "")
    if port.isdigit():
        return host, int(port)
    numbers = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    job, step, restart = (int(number) if number.isdigit() else 0 for number in numbers)
    return host, _PORTS[(job * 64 + step * 8 + restart) % len(_PORTS)]


def first_host(nodes: str) -> str:
    """The first host of a node list: gpu007 of "gpu[007-012,020],login1", rack1node3 of "rack[1-2]node[3-4]"."""
    item = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)  # commas inside brackets do not end it
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", item.group()) if item else "127.0.0.1"
