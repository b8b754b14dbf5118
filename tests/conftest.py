"""What holds for every test: the environment, set before torch is imported, and no process left behind."""

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

# Several ranks share few cores here: one thread each, or their thread pools spin against one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test needs the network; without these a missing file would be looked for on the hub, with long time-outs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# A private folder: a lock left elsewhere by a killed build of a DeepSpeed op would make later builds wait for ever.
_EXTENSIONS = tempfile.mkdtemp(prefix="recycle-ds-extensions-")
os.environ["TORCH_EXTENSIONS_DIR"] = _EXTENSIONS
atexit.register(shutil.rmtree, _EXTENSIONS, ignore_errors=True)
# Every process started below this one inherits the mark, however it detaches itself.
_MARK = uuid.uuid4().hex
os.environ["RECYCLE_TEST_SESSION"] = _MARK

# A shell that runs the suite in the background starts it with SIGINT ignored, and every process below would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.distributed import stop_server  # noqa: E402

torch.set_num_threads(1)

TEST_ALL = os.environ.get("RECYCLE_TEST_ALL", "0") not in ("", "0")

# No deadline: tests never assert times. The CI size draws the same examples in each run: a failure is the change's.
settings.register_profile("sample", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("all", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("all" if TEST_ALL else "sample")


def pytest_configure() -> None:
    """Lets SIGTERM and a closed terminal end the run as Ctrl-C does: pytest sums up, the tests' processes are ended."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Says which tests share a worker (pytest -n 2).

    The tests of the cluster, much of whose time is waiting, share one, because they share the cluster. Those that start several
    ranks or whole commands share the other, so that no two of them compete for the cores. Files of unit tests go to whichever
    worker is free.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = file.split("/")[1]
            return {"unit": file, "slurm": "cluster"}.get(folder, "ranks")

    config.option.loadscopereorder = False  # the long ones come first, as collected
    return ByFolder(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves tests marked `full` to RECYCLE_TEST_ALL=1, unless they are asked for by name or by marker."""
    asked = config.option.markexpr or any("::" in argument for argument in config.args)
    if TEST_ALL or asked:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
    items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends every process that the tests left running, and fails the run for it."""
    config = session.config
    stop_server()
    if not _distributes(config):  # else each worker looks after the processes of its own tests
        config.stash[_STRAGGLERS] = stragglers = _stragglers()
        for pid in stragglers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if hasattr(config, "workeroutput"):
            config.workeroutput["stragglers"] = {str(pid): command for pid, command in stragglers.items()}
    if config.stash.get(_STRAGGLERS, {}) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over what a worker of pytest-xdist reports of processes left behind."""
    left = getattr(node, "workeroutput", {}).get("stragglers", {})
    node.config.stash.setdefault(_STRAGGLERS, {}).update({int(pid): command for pid, command in left.items()})


def _distributes(config: pytest.Config) -> bool:
    """Whether this process runs no tests itself, but hands them to workers (pytest -n)."""
    return not hasattr(config, "workerinput") and bool(getattr(config.option, "numprocesses", None))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Names the processes that had to be ended, above pytest's closing line."""
    stragglers = config.stash.get(_STRAGGLERS, {})
    if stragglers:
        terminalreporter.section("processes left behind by tests (ended now)", red=True, bold=True)
        for pid, command in stragglers.items():
            terminalreporter.line(f"{pid}  {command}")


@pytest.fixture(autouse=True)
def _isolated_signals() -> Iterator[None]:
    """A test of signal handling must not leave its handlers to the next test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


_STRAGGLERS: pytest.StashKey[dict[int, str]] = pytest.StashKey()


def _stragglers() -> dict[int, str]:
    """Processes with this session's mark in their environment, pid -> command line; through /proc, so on Linux only."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"RECYCLE_TEST_SESSION={_MARK}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # gone meanwhile, or another user's
            continue
        # multiprocessing's own helper lives as long as this process does.
        if int(folder.name) != os.getpid() and command and "resource_tracker" not in command:
            found[int(folder.name)] = command[:200]
    return found
