"""Runs a launcher's module so that SIGTERM does not reach it: its ranks, which do hear it, must have the time to save.

shielded.py MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import signal
import sys
from typing import Any

_install = signal.signal


def _all_but_term(number: int, handler: Any) -> Any:
    return None if number == signal.SIGTERM else _install(number, handler)


if __name__ == "__main__":
    _install(signal.SIGTERM, signal.SIG_IGN)
    signal.signal = _all_but_term
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
