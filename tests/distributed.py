"""Runs a test's function on N local ranks, with real processes and gloo groups. All ranks end before the call returns.

    def sum_of_ranks(rank: int, world_size: int, scale: float) -> float: ...

    assert run_ranks(sum_of_ranks, 2, 10.0) == [10.0, 10.0]

The function must be defined at the top level of an importable module, because each rank is a separate process that
imports it. The variables that torchrun would set are set, so the function may call `recycle_ds.parallel`'s rendezvous,
or `torch.distributed.init_process_group("gloo")`. The harness itself creates no group.

Importing torch, DeepSpeed and megatron-core takes seconds per rank. Ranks are therefore forked from a server process
that has imported them (tests/preload.py) and has no threads and no state of a test. Ranks get the environment
variables, the working directory and sys.path of the calling process.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_ROOT = Path(__file__).parents[1]
# Protects the fork server and multiprocessing's process list, which are not thread-safe.
_starting = threading.Lock()
# Ranks of tests use the CPU, also on a machine with GPUs.
_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
_PORT_ATTEMPTS = 3
_PR_SET_PDEATHSIG = 1
# Prefixes of variables that would make a rank behave as a part of the job that runs the tests.
_JOB_PREFIXES = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MV2_", "TORCHELASTIC_")


class RankError(RuntimeError):
    """A rank failed. The message has the traceback of the rank's exception, or says how the rank died."""


class RankTimeout(RankError):
    """The ranks did not end in time; the message has each rank's stack trace."""


def run_ranks(function: Callable[..., T], world_size: int, *args: Any, timeout: float = 120.0) -> list[T]:
    """Calls `function(rank, world_size, *args)` on every rank and returns the results in the order of ranks.

    Raises the exception of the rank that failed first (caused by a RankError with its traceback), a RankError if a rank
    died without an exception, and RankTimeout after `timeout` seconds. All ranks end before the call returns.
    """
    for attempt in range(_PORT_ATTEMPTS):
        try:
            return _run_once(function, world_size, args, timeout)
        except Exception as error:
            # Another process took the free port before rank 0 opened it: try another one.
            if "EADDRINUSE" not in str(error) or attempt + 1 == _PORT_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def run_in_sets(
    function: Callable[..., list[T]], world_size: int, items: Sequence[Any], size: int = 4, at_once: int = 2
) -> list[list[T]]:
    """Calls `run_ranks(function, world_size, set)` for sets of `size` items, `at_once` sets at a time.

    function: returns one result per item. Returns the results by rank, in the order of the items. Sets are small
    because the threads of a run's process groups last as long as their process: many runs in one process slow each
    other down. Several sets run at a time because ranks that wait for each other leave cores idle.
    """
    sets = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(lambda some: run_ranks(function, world_size, some, timeout=120 + 30 * len(some)), sets))
    return [[result for by_rank in found for result in by_rank[rank]] for rank in range(world_size)]


def free_port() -> int:
    """A free TCP port of this host, below the ephemeral ports, which another test's connection could take first."""
    for port in random.SystemRandom().sample(range(15_000, 32_000), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("100 ports between 15000 and 32000 are in use")


def stop_server() -> None:
    """Ends the server process from which ranks are forked, if it is running."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _server() -> multiprocessing.context.ForkServerContext:
    """The context whose processes are forked from a server that has imported tests/preload.py."""
    context = multiprocessing.get_context("forkserver")
    with _starting:  # tests may start ranks from several threads
        context.set_forkserver_preload(["tests.preload"])
        before = dict(os.environ)
        _remove_job_variables()
        # packages read these variables when they are imported
        os.environ.update(_CPU, PYTHONPATH=os.pathsep.join([str(_ROOT), before.get("PYTHONPATH", "")]))
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
    return context


def _run_once(function: Callable[..., T], world_size: int, args: tuple[Any, ...], timeout: float) -> list[T]:
    context = _server()
    with _starting:
        surroundings = (dict(os.environ), os.getcwd(), list(sys.path))
    call = pickle.dumps((function, args))
    port, deadline = free_port(), time.time() + timeout
    with tempfile.TemporaryDirectory(prefix="recycle-ds-ranks-") as name:
        folder = Path(name)
        ranks: list[BaseProcess] = [
            context.Process(target=_rank_main, args=(rank, world_size, port, deadline, surroundings, folder, call))
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                # start() also polls the processes of other threads, which is not thread-safe
                with _starting:
                    process.start()
            in_time = _wait(ranks, folder, deadline)
            exit_codes = [_exit_code(process) for process in ranks]
        finally:
            _end(ranks)
        outcomes = [_read(folder / f"outcome-{rank}") for rank in range(world_size)]
        _raise_first_failure(outcomes)
        if not in_time:
            raise RankTimeout(f"{function.__qualname__}: not done after {timeout:g} s\n{_stacks(folder, world_size)}")
        died = [f"rank {rank} exited with code {code}" for rank, code in enumerate(exit_codes) if code]
        if died:
            raise RankError(f"{function.__qualname__}: {', '.join(died)}")
        silent = [rank for rank, code in enumerate(exit_codes) if code == 0 and outcomes[rank] is None]
        if silent:
            raise RankError(f"{function.__qualname__}: ranks {silent} exited without a result")
        return [outcome["result"] for outcome in outcomes if outcome is not None]


def _exit_code(process: BaseProcess) -> int | None:
    """The exit code, None while the process runs. multiprocessing's own check is not thread-safe."""
    with _starting:
        return process.exitcode


def _wait(ranks: list[BaseProcess], folder: Path, deadline: float) -> bool:
    """Waits until all ranks have ended or one has failed; the others would wait for it. Returns False on timeout."""
    while True:
        codes = [_exit_code(process) for process in ranks]
        running = [process.sentinel for process, code in zip(ranks, codes, strict=True) if code is None]
        ended = [(rank, code) for rank, code in enumerate(codes) if code is not None]
        if not running or any(code != 0 or not (folder / f"outcome-{rank}").exists() for rank, code in ended):
            return True
        remaining = deadline - time.time()
        if remaining <= 0:
            return False
        multiprocessing.connection.wait(running, remaining)


def _end(ranks: list[BaseProcess]) -> None:
    """Kills the ranks that still run. Only SIGKILL ends a rank that hangs in a collective."""
    started = [process for process in ranks if process.pid is not None]
    for process in started:
        process.kill()
    for process in started:
        with _starting:
            process.join()


def _raise_first_failure(outcomes: list[dict[str, Any] | None]) -> None:
    """Raises the earliest exception of a rank. The later "connection closed" of other ranks would hide the cause."""
    failed = [outcome for outcome in outcomes if outcome is not None and "traceback" in outcome]
    if not failed:
        return
    first = min(failed, key=lambda outcome: outcome["time"])
    cause = RankError(f"rank {first['rank']} of {len(outcomes)}\n{first['traceback']}")
    error: BaseException | None = None
    with contextlib.suppress(Exception):  # an exception that cannot be unpickled is reported by its traceback only
        error = pickle.loads(first["exception"])  # of a rank that this process has started
    if isinstance(error, Exception):
        raise error from cause
    raise cause


def _stacks(folder: Path, world_size: int) -> str:
    """Each rank's stack trace, one second before the timeout."""
    files = [folder / f"stack-{rank}" for rank in range(world_size)]
    texts = [file.read_text() if file.exists() else "" for file in files]
    return "\n".join(f"rank {rank}:\n{text or '  ended, or not yet running'}" for rank, text in enumerate(texts))


def _read(file: Path) -> dict[str, Any] | None:
    # pickles are only exchanged between this process and the ranks that it has started
    return pickle.loads(file.read_bytes()) if file.exists() else None


def _rank_main(
    rank: int, world_size: int, port: int, deadline: float, surroundings: tuple[Any, ...], folder: Path, call: bytes
) -> None:
    """One rank: sets up its process, calls the function and writes its result or its error."""
    _die_with_server()
    environment, directory, path = surroundings
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.path[:] = path
    _set_environment(rank, world_size, port)
    outcome: dict[str, Any] = {"rank": rank}
    with open(folder / f"stack-{rank}", "w") as stack:
        faulthandler.dump_traceback_later(max(deadline - time.time() - 1.0, 0.1), file=stack)
        try:
            # from the process that has started this rank; imports the test's module, and torch with it
            function, args = pickle.loads(call)
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
    _destroy_groups()
    if "torch" in sys.modules:
        from recycle_ds.parallel.rendezvous import exit_process

        exit_process(0)


def _die_with_server() -> None:
    """Makes Linux kill this rank when the server dies. The server dies with pytest, so no rank outlives pytest."""
    if sys.platform == "linux":
        server = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)


def _set_environment(rank: int, world_size: int, port: int) -> None:
    _remove_job_variables()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **_CPU,
    )


def _remove_job_variables() -> None:
    for name in [name for name in os.environ if name.startswith(_JOB_PREFIXES)]:
        del os.environ[name]


def _switch_off_shared_memory_op() -> None:
    """Keeps DeepSpeed's `init_distributed` from compiling its shared-memory op (25 s, and a lock that may hang)."""
    if "torch" in sys.modules:  # a module that does not import torch does not use DeepSpeed either
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _write(file: Path, outcome: dict[str, Any]) -> None:
    """Writes to a temporary file and renames it: a rank may be killed at any moment."""
    temporary = file.with_name(f".tmp-{file.name}")
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.replace(file)


def _destroy_groups() -> None:
    """Destroys the function's process groups, if any: gloo's threads abort a process that exits with open groups."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
