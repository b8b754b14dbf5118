"""A part of the check, which is a process with a time limit, and what became of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


@dataclass(frozen=True)
class Part:
    """A command that writes what it finds to `results` while it runs: lines of JSON, for tests or for a bench's figures."""

    name: str
    command: tuple[str, ...]
    """Arguments of the Python interpreter."""
    results: Path
    seconds: float
    """It is killed after this time."""
    alone: bool = False
    """Whether nothing may run beside it: its times count."""


@dataclass(frozen=True)
class Checked:
    """What became of one test of a part."""

    name: str
    state: str
    seconds: float = 0.0
    message: str = ""
    """The last lines of a failure."""


@dataclass(frozen=True)
class Result:
    """What became of a part."""

    name: str
    state: str
    seconds: float = 0.0
    limit: float = 0.0
    tests: tuple[Checked, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    """A bench's figures, as far as it came."""
    output: tuple[str, ...] = ()
    """The last lines that it printed, if it did not pass."""

    def report(self) -> dict[str, Any]:
        """For report.json; figures are there by themselves."""
        tree = asdict(self)
        del tree["figures"]
        return tree
