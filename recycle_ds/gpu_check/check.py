"""The complete check: parts side by side, then benches alone, a report that is written anew after each of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from recycle_ds.gpu_check.part import PASSED, Part, Result
from recycle_ds.gpu_check.parts import CheckSettings, all_parts, fitted
from recycle_ds.gpu_check.report import Report
from recycle_ds.gpu_check.running import PartRunner

_SHARE_OF_TESTS = 0.55
"""Of the time, if benches follow: what is left of it then belongs to them."""
_RESERVE = 3.0
"""Seconds at the end for the report."""


def run_check(
    settings: CheckSettings,
    repository: Path,
    machine: Mapping[str, object],
    *,
    parts: list[Part] | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs the parts and writes report.md and report.json to settings.run_dir. Returns whether all parts passed.

    machine: what report.json has of it. parts: by default those that the settings ask for. Raises ConfigError for a name in
    settings.only that does not exist.
    """
    parts = all_parts(settings, repository) if parts is None else parts
    start = time.monotonic()
    end = start + 60 * settings.minutes - _RESERVE
    report = Report(settings, machine, [part.name for part in parts])
    report.write(0.0)
    together, alone = [part for part in parts if not part.alone], [part for part in parts if part.alone]

    def on_result(result: Result) -> None:
        report.add(result)
        report.write(time.monotonic() - start)
        passed = sum(test.state == PASSED for test in result.tests)
        count = f", {passed} of {len(result.tests)} tests" if result.tests else ""
        say(f"{result.name}: {result.state}{count}, {result.seconds:.0f} s")

    say(f"{len(together)} parts of tests, at most {settings.jobs} at once, then {len(alone)} benches alone")
    first_end = start + _SHARE_OF_TESTS * (end - start) if alone else end
    work = (settings.run_dir / "cache").resolve()
    for group, jobs, deadline, cache in ((together, settings.jobs, first_end, "tests"), (alone, 1, end, "benches")):
        environment = part_environment(settings, repository, work, cache, jobs)
        # benches get what the tests have left of the time, which is at least the benches' share
        group = fitted(group, deadline - time.monotonic()) if group is alone else group
        PartRunner(repository, environment, deadline, on_result).run(group, jobs)
    report.write(time.monotonic() - start, complete=True)
    return all(result.state == PASSED for result in report.results)


def part_environment(settings: CheckSettings, repository: Path, work: Path, cache: str, jobs: int) -> dict[str, str]:
    """The environment of a part. cache: measured costs of decoding are kept by this name: those that were measured beside
    other parts are not for the benches."""
    environment = dict(os.environ)
    paths = [str(repository), *filter(None, [environment.get("PYTHONPATH")])]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "RECYCLE_GPU_DEVICE": settings.device,
        "DS_ACCELERATOR": settings.device,
        "DS_BUILD_OPS": "0",
        "DS_SKIP_CUDA_CHECK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "XDG_CACHE_HOME": str(work / cache),
        "TORCH_EXTENSIONS_DIR": str(work / "torch_extensions"),
        # threads of tiny products wait for one another on cores that others use
        "OMP_NUM_THREADS": "1" if settings.rehearsal else str(max(1, cores // jobs)),
        "PYTHONUNBUFFERED": "1",
    }
    for name, value in (
        ("NCCL_SOCKET_IFNAME", "lo"),  # one host, perhaps without any other interface
        ("GLOO_SOCKET_IFNAME", "lo"),
        ("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor")),  # compiled once for all parts
        ("TRITON_CACHE_DIR", str(work / "triton")),
    ):
        environment.setdefault(name, value)
    if settings.rehearsal:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # each part is a single process, whatever started the check
    return environment
