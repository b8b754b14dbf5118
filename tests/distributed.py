"""Runs a test's function on N ranks of this machine: real processes, real gloo groups, and nothing left behind.

    def sum_of_ranks(rank: int, world_size: int, scale: float) -> float: ...

    assert run_ranks(sum_of_ranks, 2, 10.0) == [10.0, 10.0]

The function must stand at the top level of an importable module: each rank is a fresh interpreter that imports it. It
finds the variables that torchrun would set, so it may call `recycle_ds.parallel`'s rendezvous, or
`torch.distributed.init_process_group("gloo")`; the harness itself opens no group.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_PORT_ATTEMPTS = 3
_PR_SET_PDEATHSIG = 1
# Variables by which a rank could take itself for part of the job that the tests themselves run in.
_FOREIGN = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MV2_", "TORCHELASTIC_")


class RankError(RuntimeError):
    """A rank failed. The cause of the exception a rank raised, with that rank's traceback; or what took a rank down."""


class RankTimeout(RankError):
    """The ranks did not end in time; the message shows where each one stood."""


def run_ranks(function: Callable[..., T], world_size: int, *args: Any, timeout: float = 120.0) -> list[T]:
    """Calls `function(rank, world_size, *args)` on every rank and returns the results in the order of ranks.

    Raises the exception of the rank that failed first (caused by a RankError that holds its traceback), a RankError if
    a rank died without one, and RankTimeout after `timeout` seconds. However it ends, no rank survives it.
    """
    for attempt in range(_PORT_ATTEMPTS):
        try:
            return _run_once(function, world_size, args, timeout)
        except Exception as error:
            # The free port was somebody else's by the time rank 0 opened it: nobody's fault, take another.
            if "EADDRINUSE" not in str(error) or attempt + 1 == _PORT_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def free_port() -> int:
    """A TCP port of this host that nobody listens on at the moment, below those that the kernel hands out by itself: of
    these, a connection of another test could take it before its listener does."""
    for port in random.SystemRandom().sample(range(15_000, 32_000), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("100 ports between 15000 and 32000 are in use")


def _run_once(function: Callable[..., T], world_size: int, args: tuple[Any, ...], timeout: float) -> list[T]:
    context = multiprocessing.get_context("spawn")
    call = pickle.dumps((function, args))
    port, deadline = free_port(), time.time() + timeout
    with tempfile.TemporaryDirectory(prefix="recycle-ds-ranks-") as name:
        folder = Path(name)
        ranks: list[BaseProcess] = [
            context.Process(target=_rank_main, args=(rank, world_size, port, deadline, os.getpid(), folder, call))
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            in_time = _wait(ranks, folder, deadline)
            exit_codes = [process.exitcode for process in ranks]
        finally:
            _end(ranks)
        outcomes = [_read(folder / f"outcome-{rank}") for rank in range(world_size)]
        _raise_first_failure(outcomes)
        if not in_time:
            raise RankTimeout(f"{function.__qualname__}: not done after {timeout:g} s\n{_stacks(folder, world_size)}")
        died = [f"rank {rank} ended with exit code {code}" for rank, code in enumerate(exit_codes) if code]
        if died:
            raise RankError(f"{function.__qualname__}: {', '.join(died)}")
        silent = [rank for rank, code in enumerate(exit_codes) if code == 0 and outcomes[rank] is None]
        if silent:
            raise RankError(f"{function.__qualname__}: ranks {silent} left without a result")
        return [outcome["result"] for outcome in outcomes if outcome is not None]


def _wait(ranks: list[BaseProcess], folder: Path, deadline: float) -> bool:
    """Waits for all ranks, or for the first to fail: its peers would only wait for it. False when the time is over."""
    while True:
        running = [process.sentinel for process in ranks if process.exitcode is None]
        ended = [(rank, process.exitcode) for rank, process in enumerate(ranks) if process.exitcode is not None]
        if not running or any(code != 0 or not (folder / f"outcome-{rank}").exists() for rank, code in ended):
            return True
        left = deadline - time.time()
        if left <= 0:
            return False
        multiprocessing.connection.wait(running, left)


def _end(ranks: list[BaseProcess]) -> None:
    """Kills the ranks that still run, by pid and not politely: one that hangs in a collective hears nothing else."""
    started = [process for process in ranks if process.pid is not None]
    for process in started:
        process.kill()
    for process in started:
        process.join()


def _raise_first_failure(outcomes: list[dict[str, Any] | None]) -> None:
    """Raises what a rank raised first: the "connection closed" of its peers, which follows, would hide it."""
    failed = [outcome for outcome in outcomes if outcome is not None and "traceback" in outcome]
    if not failed:
        return
    first = min(failed, key=lambda outcome: outcome["time"])
    cause = RankError(f"rank {first['rank']} of {len(outcomes)}\n{first['traceback']}")
    error: BaseException | None = None
    with contextlib.suppress(Exception):  # an exception that cannot be unpickled is told by its traceback alone
        error = pickle.loads(first["exception"])
    if isinstance(error, Exception):
        raise error from cause
    raise cause


def _stacks(folder: Path, world_size: int) -> str:
    """Where each rank stood one second before the time was over."""
    files = [folder / f"stack-{rank}" for rank in range(world_size)]
    texts = [file.read_text() if file.exists() else "" for file in files]
    return "\n".join(f"rank {rank}:\n{text or '  ended, or not yet running'}" for rank, text in enumerate(texts))


def _read(file: Path) -> dict[str, Any] | None:
    # pickles go between this process and the ranks that it has started, and nowhere else
    return pickle.loads(file.read_bytes()) if file.exists() else None


def _rank_main(rank: int, world_size: int, port: int, deadline: float, parent: int, folder: Path, call: bytes) -> None:
    """One rank: sets up its process, calls the function and writes what came of it."""
    _die_with(parent)
    _set_environment(rank, world_size, port)
    outcome: dict[str, Any] = {"rank": rank}
    with open(folder / f"stack-{rank}", "w") as stack:
        faulthandler.dump_traceback_later(max(deadline - time.time() - 1.0, 0.1), file=stack)
        try:
            function, args = pickle.loads(call)  # imports the test's module, and torch with it
            _switch_off_shared_memory_op()
            outcome["result"] = function(rank, world_size, *args)
            _write(folder / f"outcome-{rank}", outcome)
        except BaseException as error:
            exception = b""
            with contextlib.suppress(Exception):
                exception = pickle.dumps(error)
            failure = {"rank": rank, "time": time.time(), "traceback": traceback.format_exc(), "exception": exception}
            _write(folder / f"outcome-{rank}", failure)
            sys.exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()
    _leave_groups()
    if "torch" in sys.modules:
        from recycle_ds.parallel.rendezvous import leave

        leave(0)


def _die_with(parent: int) -> None:
    """Has Linux kill this rank when the process that started it dies, so that killing pytest orphans nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _set_environment(rank: int, world_size: int, port: int) -> None:
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        # On a machine with GPUs too, these ranks are CPU ranks.
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
    )


def _switch_off_shared_memory_op() -> None:
    """Keeps DeepSpeed's `init_distributed` from compiling its shared-memory op (25 s, and a lock to hang on)."""
    if "torch" in sys.modules:  # a function of a module without torch has no use for DeepSpeed either
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _write(file: Path, outcome: dict[str, Any]) -> None:
    """Writes under another name first: a rank may be killed at any moment."""
    temporary = file.with_name(f".tmp-{file.name}")
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.replace(file)


def _leave_groups() -> None:
    """Closes the function's process groups, if any: gloo's threads abort an interpreter that ends with them open."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
