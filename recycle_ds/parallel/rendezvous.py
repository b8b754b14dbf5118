"""Start-up of ranks and their rendezvous, under srun, deepspeed, torchrun, mpirun or as a single process."""

from __future__ import annotations

import atexit
import contextlib
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
from recycle_ds.parallel.compiler import share_compile_processes
from recycle_ds.parallel.device import backend, keep_freed_memory, local_device
from recycle_ds.parallel.launcher_variables import MPI_VARIABLES, SRUN_VARIABLES, contradiction
from recycle_ds.parallel.peers import MachineFault
from recycle_ds.parallel.slurm import has_own_gpus, master_endpoint, started_by_srun, tasks_on_host

# Number of ranks on this host: torchrun, deepspeed, Open MPI, MPICH.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


# Ranks wait in a collective while rank 0 prepares data; DeepSpeed's default of ten minutes is too short for a large corpus.
_STARTUP_TIMEOUT = timedelta(hours=6)


class LaunchError(RecycleError):
    """This process cannot start as a rank: inconsistent launcher variables, too few GPUs, or an unusable MPI."""


@dataclass(frozen=True)
class Launch:
    """This process's rank and world size, as set by the launcher."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 0
    """Number of ranks on this host; 0 if the launcher does not set it."""
    own_gpus: bool = False
    """Whether SLURM gave this rank GPUs of its own (srun --gpus-per-task). It may see the other ranks' GPUs too."""


def detect_launch(environment: Mapping[str, str]) -> Launch:
    """Reads the launcher's variables. A pure function of the environment.

    Raises LaunchError when a variable is missing or not a number, the rank is not below the world size, or the variables of
    two launchers contradict each other.
    """
    srun = started_by_srun(environment)
    wrong = contradiction(environment, srun)
    if wrong is not None:
        raise LaunchError(wrong)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed"
        return _launch(environment, launcher, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    for rank, size, local in MPI_VARIABLES:
        # srun's MPI support also sets rank and size, but no local rank: SLURM's own variables are used then
        if rank in environment and size in environment and (local in environment or not srun):
            return _launch(environment, "mpi", rank, size, local)
    if srun:
        found = _launch(environment, "srun", *SRUN_VARIABLES)
        sharing = environment.get("SLURM_NTASKS_PER_GPU", "1")
        if sharing != "1":
            raise LaunchError(
                f"SLURM_NTASKS_PER_GPU={sharing}: ranks would share a GPU: submit with --ntasks-per-gpu=1"
            )
        return replace(found, local_world_size=tasks_on_host(environment), own_gpus=has_own_gpus(environment))
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
    """Index of this rank's GPU among the `visible` ones. A pure function.

    A process that sees at least as many GPUs as ranks are on its host takes the one of its local rank. Under srun and mpirun it
    may see fewer, its own ones only, and takes the first; under torchrun and deepspeed every rank sees all GPUs of its host.
    Raises LaunchError when ranks would share a GPU.
    """
    ranks = max(launch.local_world_size, launch.local_rank + 1)
    if visible >= ranks:  # also right if all are its own
        return launch.local_rank
    if launch.own_gpus and visible:
        return 0
    if visible == 1 and launch.launcher in ("srun", "mpi"):
        return 0
    gpus = "1 visible GPU" if visible == 1 else f"{visible} visible GPUs"
    raise LaunchError(
        f"{ranks} ranks on this host and {gpus}: request one GPU per task (--gpus-per-node), or fewer tasks"
    )


def own_device(launch: Launch) -> torch.device:
    """This rank's own GPU, or the CPU without CUDA. Not collective.

    Raises LaunchError on every rank of a host that has fewer GPUs than ranks. Errors are normally printed by rank 0 only, but
    its host may have enough GPUs; on other hosts local rank 0 therefore prints the error here.
    """
    if not torch.cuda.is_available():
        return local_device()
    try:
        return local_device(device_index(launch, torch.cuda.device_count()))
    except LaunchError as error:
        if launch.rank and not launch.local_rank:
            print(f"error: rank {launch.rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        raise


def start(launch: Launch) -> bool:
    """Initialises torch.distributed through DeepSpeed, with the backend of the local device. False if it already was.

    Collective over all ranks. Disables DeepSpeed's shared-memory collective, which would be compiled on first use and ignores
    process groups. Raises LaunchError if this host has fewer GPUs than ranks, or if mpi4py is missing or belongs to another MPI
    than mpirun, both before any communication; on rank 0 also if the port is in use.
    """
    if torch.distributed.is_initialized():
        return False
    device = own_device(launch)  # raises before ranks wait for each other
    keep_freed_memory()
    share_compile_processes(launch.local_world_size)
    if launch.launcher == "mpi":
        _share_mpi_address(launch)
    elif launch.launcher == "srun":
        address, port = master_endpoint(os.environ)
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    elif launch.launcher == "single":
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # DeepSpeed uses it as the device index, which differs from the local rank if SLURM shows a task only its own GPU
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # if unset, DeepSpeed detects the CPU with a warning
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend=backend(),
            auto_mpi_discovery=False,
            verbose=False,
            timeout=_STARTUP_TIMEOUT,
            rank=launch.rank,
            world_size=launch.world_size,
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        used_host, used_port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        busy = f"port {used_port} of {used_host} is in use by another process (EADDRINUSE)"
        if launch.launcher in ("srun", "mpi") or "RECYCLE_JOB_DIR" in os.environ:
            raise MachineFault(f"{busy}: the next start uses another one") from None
        raise LaunchError(f"{busy}: choose another one (deepspeed --master_port N, torchrun --master-port N)") from None
    return True


def stop() -> None:
    """Destroys all process groups, if any, so that torch does not warn about them at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Exits with `code` after atexit handlers and a flush of stdout and stderr, without shutting down the interpreter.

    Call it when the work is done and files are closed. A gloo thread may still have to release the tensors of the last
    collective. If the interpreter has shut down by then, the process aborts (SIGABRT, "terminate called without an active
    exception"), and the launcher takes a finished rank for a crashed one.
    """
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
                stream.flush()
    finally:
        os._exit(code)


def shorten_timeouts(seconds: float) -> None:
    """Sets the collective timeout of every existing process group on this rank, once no rank prepares data any more."""
    from torch.distributed import distributed_c10d as c10d

    if torch.distributed.is_initialized():
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def quiet_libraries() -> None:
    """Suppresses megatron-core's import warnings (optional CUDA packages), torch's deprecation warnings for collectives that
    megatron-core and DeepSpeed call, and torch.distributed's logs below WARNING."""
    import warnings

    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("torch.distributed").setLevel(logging.WARNING)


def _share_mpi_address(launch: Launch) -> None:
    """Sets MASTER_ADDR and MASTER_PORT: rank 0 picks a free port and broadcasts it over MPI. Collective over all ranks.

    Raises LaunchError if mpi4py is missing or belongs to another MPI than mpirun.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(f"started by mpirun, but mpi4py cannot be imported ({error}): pip install mpi4py") from None
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.world_size):
        raise LaunchError(
            f"mpirun set rank {launch.rank} of {launch.world_size}, but mpi4py has {world.Get_rank()} of "
            f"{world.Get_size()}: reinstall mpi4py with the MPI of this mpirun"
        )
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    address, port = world.bcast((address, _free_port()) if launch.rank == 0 else None, root=0)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
