"""How this process finds the others: srun, deepspeed, torchrun, mpirun, or alone."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NoReturn

import torch

from recycle_ds.config import RecycleError
from recycle_ds.parallel.device import backend, device, keep_freed_memory
from recycle_ds.parallel.slurm import meeting_point, started_by_srun, tasks_on_host

# The first of these that is set tells an MPI process its rank, world size and rank on its host.
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)
# Ranks on this host, as torchrun, deepspeed, Open MPI and MPICH say it.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


# Ranks wait for the first one while it prepares data: DeepSpeed's ten minutes would end them on a corpus of some size.
_PATIENCE = timedelta(hours=6)


class LaunchError(RecycleError):
    """The environment does not say consistently which process this is."""


@dataclass(frozen=True)
class Launch:
    """Who this process is among those started together."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 0
    """Ranks on this host; 0 where the launcher does not say."""
    own_gpus: bool = False
    """Whether the GPUs that this process sees are no other one's (srun --gpus-per-task)."""


def detect_launch(environment: Mapping[str, str]) -> Launch:
    """Reads the launcher's variables. A pure function of the environment.

    Raises LaunchError when a variable is missing or not a number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed"
        return _launch(environment, launcher, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    srun = started_by_srun(environment)
    for rank, size, local in _MPI_VARIABLES:
        # srun's own MPI support sets rank and size as well, but not the rank on the host: then SLURM knows more
        if rank in environment and size in environment and (local in environment or not srun):
            return _launch(environment, "mpi", rank, size, local)
    if srun:
        found = _launch(environment, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        own = bool(environment.get("SLURM_GPUS_PER_TASK"))
        return replace(found, local_world_size=tasks_on_host(environment), own_gpus=own)
    return Launch("single", 0, 1, 0)


def _launch(environment: Mapping[str, str], launcher: str, rank: str, size: str, local: str) -> Launch:
    values = []
    for name in (rank, size, local):
        text = environment.get(name, "0" if name == local and environment.get(size) == "1" else "")
        if not text.isdigit():
            raise LaunchError(
                f"{name}={text!r} is not a number: start with srun, deepspeed, torchrun, mpirun or plain python"
            )
        values.append(int(text))
    if values[0] >= values[1]:
        raise LaunchError(f"{rank}={values[0]} must be below {size}={values[1]}")
    on_host = next((environment[name] for name in _LOCAL_SIZES if environment.get(name, "").isdigit()), "0")
    return Launch(launcher, values[0], values[1], values[2], int(on_host))


def device_index(launch: Launch, visible: int) -> int:
    """Which of the `visible` GPUs is this rank's. A pure function.

    srun and mpirun may show a process one GPU only, its own; torchrun and deepspeed show each rank all of them. Raises
    LaunchError where ranks would share one.
    """
    if launch.own_gpus and visible:
        return 0
    ranks = max(launch.local_world_size, launch.local_rank + 1)
    if visible >= ranks:
        return launch.local_rank
    if visible == 1 and launch.launcher in ("srun", "mpi"):
        return 0
    gpus = "1 visible GPU" if visible == 1 else f"{visible} visible GPUs"
    raise LaunchError(
        f"{ranks} ranks on this host and {gpus}: ask for a GPU for each task (--gpus-per-node), or fewer tasks"
    )


def own_device(launch: Launch) -> torch.device:
    """This rank's device, which no other rank has, or the CPU. Raises LaunchError where there are too few GPUs.

    Every rank of a host does then. The first rank of all tells errors, but its host may have enough: one of each host prints.
    """
    if not torch.cuda.is_available():
        return device()
    try:
        return device(device_index(launch, torch.cuda.device_count()))
    except LaunchError as error:
        if launch.rank and not launch.local_rank:
            print(f"error: rank {launch.rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        raise


def start(launch: Launch) -> bool:
    """Sets up torch.distributed through DeepSpeed, on the backend of this machine's device. False where it already was.

    DeepSpeed's shared-memory collective would be compiled on first use (and ignores process groups): it is switched off.
    Raises LaunchError where there are fewer GPUs than ranks on this host, or MPI does not work.
    """
    if torch.distributed.is_initialized():
        return False
    place = own_device(launch)  # before ranks wait for one another
    keep_freed_memory()
    if launch.launcher == "mpi":
        _share_mpi_address(launch)
    elif launch.launcher == "srun":
        address, port = meeting_point(os.environ)
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    elif launch.launcher == "single":
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    if place.type == "cuda":
        torch.cuda.set_device(place)
        # DeepSpeed takes it for the number of the device, of which SLURM may show a task its own only
        os.environ["LOCAL_RANK"] = str(place.index)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # found out by itself, DeepSpeed warns about it
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=backend(),
        auto_mpi_discovery=False,
        verbose=False,
        timeout=_PATIENCE,
        rank=launch.rank,
        world_size=launch.world_size,
    )
    return True


def stop() -> None:
    """Leaves the process group, so that no rank warns about a group left behind."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends this process once its work is done and its files are closed, without taking the interpreter apart.

    A thread of gloo's may still be about to release the tensors of the last collective. Where the interpreter has gone by then,
    that aborts the process (SIGABRT, "terminate called without an active exception"), and a launcher takes a rank that has
    finished for one that crashed. What was registered to run at the end is run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shorten_timeouts(seconds: float) -> None:
    """How long collectives of every existing group wait from now on; start-up, where a rank may prepare data, is over."""
    from torch.distributed import distributed_c10d as c10d

    if torch.distributed.is_initialized():
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def quiet_libraries() -> None:
    """Hides what megatron-core warns about on import (packages for CUDA that it does without), what torch says of the older
    names of collectives that megatron-core and DeepSpeed call, and logs of torch's groups."""
    import warnings

    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("torch.distributed").setLevel(logging.WARNING)


def _share_mpi_address(launch: Launch) -> None:
    """Rank 0 picks a free port on its host and tells the others through MPI."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(f"started by mpirun, but mpi4py cannot be loaded ({error}): pip install mpi4py") from None
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.world_size):
        raise LaunchError(
            f"mpirun says rank {launch.rank} of {launch.world_size}, mpi4py says {world.Get_rank()} of "
            f"{world.Get_size()}: mpi4py was built for another MPI than this mpirun"
        )
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    address, port = world.bcast((address, _free_port()) if launch.rank == 0 else None, root=0)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
