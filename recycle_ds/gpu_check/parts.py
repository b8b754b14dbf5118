"""Which parts a check has: every file of tests/gpu, and the benches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from recycle_ds.config import ConfigError
from recycle_ds.gpu_check.part import Part

BENCHES = {
    "machine": 45.0,
    "training": 110.0,
    "decoding": 70.0,
    "serving": 60.0,
    "training_large": 70.0,
    "kernels": 40.0,
}
"""In the order in which they run, the most telling first, with their time limits in seconds. See bench.py."""
NEEDED = {"kernels": ("liger_kernel", "liger-kernel")}
"""Benches that compare with a package that is no dependency, its module and its name. Without it they are left out, but for
rehearsals."""
_WEIGHTY = ("zero", "memory_savers", "compiled", "decoding_graphs")
"""Files of tests that take longest. They start first, so that none of them is left for the end."""
_TESTS_LIMIT = 230.0
_SLACK = 4.0
"""A rehearsal's limits over those of a GPU: it may share a few cores with others."""
BENCH = "bench_"
"""How the names of benches among parts begin."""


@dataclass(frozen=True)
class CheckSettings:
    """device: "cuda", or "cpu" for a rehearsal. minutes: all parts end by then. only: names of parts; empty for all. model: a
    folder of SmolLM2-135M with a recycle module; None for random weights of its shape. jobs: tests side by side."""

    run_dir: Path
    device: str = "cuda"
    minutes: float = 8.0
    only: tuple[str, ...] = ()
    model: Path | None = None
    jobs: int = 6

    def __post_init__(self) -> None:
        """Raises ConfigError for values out of range."""
        if not 0.05 <= self.minutes <= 1440:
            raise ConfigError(f"--minutes {self.minutes:g}: must be between 0.05 and 1440")
        if self.jobs < 1:
            raise ConfigError(f"--jobs {self.jobs}: must be at least 1")

    @property
    def rehearsal(self) -> bool:
        """Whether this is no GPU: figures then say nothing about one."""
        return self.device == "cpu"


def all_parts(settings: CheckSettings, repository: Path) -> list[Part]:
    """The parts that are asked for: tests first, the longest before others, benches last.

    Raises ConfigError for names that do not exist."""
    work = settings.run_dir / "parts"
    files = sorted((repository / "tests" / "gpu").glob("test_*.py"))
    if not files:
        raise ConfigError(f"{repository}/tests/gpu has no tests: run this in a clone of the repository")
    found = []
    slack = _SLACK if settings.rehearsal else 1.0
    order = {f"test_{name}": place for place, name in enumerate(_WEIGHTY)}
    for file in sorted(files, key=lambda one: order.get(one.stem, len(order))):
        name, results = file.stem.removeprefix("test_"), work / f"{file.stem}.jsonl"
        relative = str(file.relative_to(repository))
        command = ("-m", "recycle_ds.gpu_check.functions", relative, str(results.resolve()))
        found.append(Part(name, command, results, slack * _TESTS_LIMIT))
    for name, seconds in BENCHES.items():
        module, package = NEEDED.get(name, ("", ""))
        if module and not settings.rehearsal and find_spec(module) is None:
            if f"{BENCH}{name}" in settings.only:
                raise ConfigError(
                    f"--only {BENCH}{name}: it compares with {package}: install it, or put it on PYTHONPATH"
                )
            continue
        results = work / f"bench_{name}.jsonl"
        bench = ("-m", "recycle_ds.gpu_check.bench", name, str(results.resolve()), *_options(settings))
        found.append(Part(f"{BENCH}{name}", bench, results, slack * seconds, alone=True))
    names = [part.name for part in found]
    for name in settings.only:
        if name not in names:
            raise ConfigError(f"--only {name}: no such part; they are {', '.join(names)}")
    return [part for part in found if not settings.only or part.name in settings.only]


def fitted(parts: Sequence[Part], seconds: float) -> list[Part]:
    """Parts that run one after the other, with limits that are reduced alike until their sum is at most `seconds`: a hang of
    one does not use up the time of the next."""
    share = min(1.0, max(0.0, seconds) / max(sum(part.seconds for part in parts), 1e-9))
    return [replace(part, seconds=share * part.seconds) for part in parts]


def _options(settings: CheckSettings) -> tuple[str, ...]:
    """Options of a bench."""
    model = () if settings.model is None else ("--model", str(settings.model.resolve()))
    return (*(("--small",) if settings.rehearsal else ()), *model)


def default_jobs() -> int:
    """How many parts run side by side: each has at least two cores of this process, and six fill a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(6, cores // 2))
