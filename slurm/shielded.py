"""Runs a launcher's module so that SIGTERM, SIGINT and SIGUSR1 do not reach it: its ranks, which do hear them, must have the
time to save.

shielded.py MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import signal
import sys
from typing import Any

SHIELDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_install = signal.signal


def _all_others(number: int, handler: Any) -> Any:
    return None if number in SHIELDED else _install(number, handler)


if __name__ == "__main__":
    for one in SHIELDED:
        _install(one, signal.SIG_IGN)
    signal.signal = _all_others
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
