"""A new interpreter for tests of commands: what it prints, and which heavy packages it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT

# The last line on stderr lists the heavy packages that were imported.
RUN = """
import json, sys
from importlib import import_module
try:
    import_module({module!r}).main({arguments!r})
finally:
    heavy = ("torch", "deepspeed", "megatron", "transformers")
    print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr)
"""


def python(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter, by default in the root of the repository."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder or ROOT, env=environment, timeout=120,
        check=False,
    )  # fmt: skip
