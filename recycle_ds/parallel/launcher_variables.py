"""Contradictions between the variables of several launchers. Pure functions of the environment.

Launchers may be nested: srun starts one torchrun or one DeepSpeed launcher per node, or the proxies of mpirun. Then the numbers
of both have a known relation. Where they do not, one of them is left over from another shell or job, and every task would take
itself for a run of its own, on one run folder.
"""

from __future__ import annotations

from collections.abc import Mapping

MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)
"""Variables with an MPI process's rank, world size and local rank; the first ones set are used."""
SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
"""The same of srun."""
_OWN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# How many launchers of one kind work together: torchrun's agents, DeepSpeed's nodes.
_LAUNCHERS = {"GROUP_WORLD_SIZE": "torchrun", "CROSS_SIZE": "deepspeed"}


def contradiction(environment: Mapping[str, str], started_by_srun: bool) -> str | None:
    """What contradicts what, and what to do; None if all launchers' variables fit together.

    started_by_srun: whether SLURM's variables are those of several tasks. Numbers that are no numbers are not judged here.
    """
    mpi = [names for names in MPI_VARIABLES if all(environment.get(name, "").isdigit() for name in names)]
    if len(mpi) == 2 and _numbers(environment, mpi[0]) != _numbers(environment, mpi[1]):
        return f"{_shown(environment, mpi[0])} contradicts {_shown(environment, mpi[1])}: unset those of the other MPI"
    outer = SRUN_VARIABLES if started_by_srun else None
    if mpi and outer is not None:
        (_, tasks), (_, size) = _numbers(environment, outer), _numbers(environment, mpi[0])
        if size < tasks:  # mpirun starts at most one proxy per process
            return _left_over(environment, mpi[0], outer)
    outer = mpi[0] if mpi else outer
    wrong = _half_set(environment, outer) or _wrong_master(environment, outer)
    if wrong is not None:
        return wrong
    if outer is None or not all(environment.get(name, "").isdigit() for name in (*_OWN_VARIABLES[:2], *outer[:2])):
        return None
    tasks = _numbers(environment, outer)[1]
    for name, launcher in _LAUNCHERS.items():
        if environment.get(name, "").isdigit():
            if tasks in (1, int(environment[name])):
                return None
            return (
                f"{name}={environment[name]} of {launcher} contradicts {outer[1]}={tasks}: each task would be a run of "
                f"its own. Start {launcher} for {tasks} nodes (torchrun --nnodes={tasks}), or independent runs one by one; "
                f"if {launcher} was not started here, unset {name}, RANK, WORLD_SIZE and LOCAL_RANK"
            )
    if tasks > 1 and _numbers(environment, _OWN_VARIABLES) != _numbers(environment, outer):
        return _left_over(environment, _OWN_VARIABLES, outer)
    return None


def _half_set(environment: Mapping[str, str], outer: tuple[str, str, str] | None) -> str | None:
    """What is wrong if only one of RANK and WORLD_SIZE is set, which is then not used."""
    if ("RANK" in environment) == ("WORLD_SIZE" in environment):
        return None
    place = 0 if "RANK" in environment else 1
    name, other = _OWN_VARIABLES[place], _OWN_VARIABLES[1 - place]
    used = environment.get(outer[place], "") if outer is not None else str(place)  # of one process: rank 0 of 1
    if environment[name] == used:
        return None
    against = f"{outer[place]}={used}" if outer is not None else f"{other} is not set"
    return f"{name}={environment[name]}, but {against}: set both, or unset {name} if it is left over"


def _wrong_master(environment: Mapping[str, str], outer: tuple[str, str, str] | None) -> str | None:
    """What is wrong if ranks of several nodes would look for rank 0 on their own node, and wait for hours."""
    address, nodes = environment.get("MASTER_ADDR", ""), environment.get("SLURM_STEP_NUM_NODES", "1")
    if outer != SRUN_VARIABLES or "RANK" in environment or nodes == "1":
        return None
    if address not in ("localhost", "::1") and not address.startswith("127."):
        return None
    return (
        f"MASTER_ADDR={address} contradicts SLURM_STEP_NUM_NODES={nodes}: unset it, or set it to the first node's name"
    )


def _numbers(environment: Mapping[str, str], names: tuple[str, str, str]) -> tuple[int, int]:
    """Rank and world size."""
    found = [environment.get(name, "") for name in names[:2]]
    rank, size = (int(text) if text.isdigit() else -1 for text in found)
    return rank, size


def _shown(environment: Mapping[str, str], names: tuple[str, str, str]) -> str:
    return f"{names[0]}={environment.get(names[0])} of {names[1]}={environment.get(names[1])}"


def _left_over(environment: Mapping[str, str], inner: tuple[str, str, str], outer: tuple[str, str, str]) -> str:
    return (
        f"{_shown(environment, inner)} contradicts {_shown(environment, outer)}: if they are left over from another shell or "
        f"job, unset {', '.join(inner[:2])} and {inner[2]}"
    )
