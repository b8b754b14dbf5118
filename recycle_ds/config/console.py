"""Consoles for tables and figures, on a terminal and in a pipe or log alike."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Columns of a pipe or a log file: no table is so wide, so nothing is cut or folded there.
_UNLIMITED = 10_000


def output_console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr that is as wide as the terminal; in a pipe or a log, as wide as its content needs."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _UNLIMITED)
