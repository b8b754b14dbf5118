"""Setup for all tests: environment variables, set before torch is imported, and the check for leftover processes."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

# Several ranks share a few cores: with more than one thread per rank, their thread pools would compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test needs the network. Without these variables, a missing file is requested from the hub, with long timeouts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# A private folder: in the default one, the lock of a killed build of a DeepSpeed op would block later builds forever.
_EXTENSIONS = tempfile.mkdtemp(prefix="recycle-ds-extensions-")
os.environ["TORCH_EXTENSIONS_DIR"] = _EXTENSIONS
atexit.register(shutil.rmtree, _EXTENSIONS, ignore_errors=True)
# Measured costs of decoding are stored there: the user's own must neither be read nor written.
os.environ["XDG_CACHE_HOME"] = _EXTENSIONS
# All descendant processes inherit this variable, even if they leave the process group or session.
_MARK = uuid.uuid4().hex
os.environ["RECYCLE_TEST_SESSION"] = _MARK

# A shell starts background jobs with SIGINT ignored, and all child processes would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.distributed import stop_server  # noqa: E402

torch.set_num_threads(1)

TEST_ALL = os.environ.get("RECYCLE_TEST_ALL", "0") not in ("", "0")

# No deadline: tests never assert times. The profile for CI draws the same examples in every run, so a new failure is
# caused by a change of the code.
settings.register_profile("sample", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("all", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("all" if TEST_ALL else "sample")


def pytest_configure() -> None:
    """Handles SIGTERM and SIGHUP like Ctrl-C: pytest prints its summary, and the tests' processes are ended."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Assigns tests to workers (pytest -n 2).

    The SLURM tests run on one worker because they share the cluster; they wait most of the time. The tests that start
    several ranks or complete commands run on the other worker, so that no two of them compete for the cores. Files of
    unit tests and of in_the_wild run on any free worker.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = file.split("/")[1]
            return {"unit": file, "in_the_wild": file, "slurm": "cluster"}.get(folder, "ranks")

    config.option.loadscopereorder = False  # keep the order of collection: long tests first
    return ByFolder(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests marked `full`, unless RECYCLE_TEST_ALL=1 is set or tests are selected by name or by marker."""
    asked = config.option.markexpr or any("::" in argument for argument in config.args)
    if TEST_ALL or asked:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
    items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Kills the processes that the tests left running, and fails the run if there are any."""
    config = session.config
    stop_server()
    if not _distributes(config):  # otherwise each worker checks the processes of its own tests
        config.stash[_LEFTOVER] = leftover = _leftover_processes()
        for pid in leftover:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if hasattr(config, "workeroutput"):
            config.workeroutput["leftover"] = {str(pid): command for pid, command in leftover.items()}
    if config.stash.get(_LEFTOVER, {}) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collects the leftover processes that a worker of pytest-xdist reports."""
    left = getattr(node, "workeroutput", {}).get("leftover", {})
    node.config.stash.setdefault(_LEFTOVER, {}).update({int(pid): command for pid, command in left.items()})


def _distributes(config: pytest.Config) -> bool:
    """Whether this process runs no tests itself, but distributes them to workers (pytest -n)."""
    return not hasattr(config, "workerinput") and bool(getattr(config.option, "numprocesses", None))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Lists the killed processes above pytest's last line."""
    leftover = config.stash.get(_LEFTOVER, {})
    if leftover:
        terminalreporter.section("processes left running by tests (killed now)", red=True, bold=True)
        for pid, command in leftover.items():
            terminalreporter.line(f"{pid}  {command}")


@pytest.fixture(autouse=True)
def _isolated_signals() -> Iterator[None]:
    """Restores the signal handlers after every test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


_LEFTOVER: pytest.StashKey[dict[int, str]] = pytest.StashKey()


def _leftover_processes() -> dict[int, str]:
    """Processes with this session's mark in their environment: pid -> command line. Reads /proc: Linux only."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"RECYCLE_TEST_SESSION={_MARK}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # the process has ended, or belongs to another user
            continue
        # multiprocessing's resource tracker runs as long as this process.
        if int(folder.name) != os.getpid() and command and "resource_tracker" not in command:
            found[int(folder.name)] = command[:200]
    return found
