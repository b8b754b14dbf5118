"""Runs a launcher's module with SIGTERM, SIGINT and SIGUSR1 ignored, so that it does not kill its ranks: they handle these
signals themselves and need time to save.

shielded.py MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import signal
import sys
from typing import Any

SHIELDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_install = signal.signal


def _install_unless_shielded(number: int, handler: Any) -> Any:
    return None if number in SHIELDED else _install(number, handler)


if __name__ == "__main__":
    for number in SHIELDED:
        _install(number, signal.SIG_IGN)
    signal.signal = _install_unless_shielded
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
