"""Runs the test functions of one file, so that tests/gpu needs no pytest: a bare GPU machine may not have it.

`python -m recycle_ds.gpu_check.functions tests/gpu/test_X.py RESULTS.jsonl`. A test is a function `test_...` without
parameters, or with `tmp_path`, a folder of its own. pytest runs the same files.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recycle_ds.gpu_check.part import FAILED, PASSED
from recycle_ds.gpu_check.running import announce

_KEPT_CHARACTERS = 2000


def main(file: str, results: str) -> int:
    """Runs all tests of a file below the current folder. Appends a line to `results` before the first test, with the names of
    all, and after each. Returns 1 if any failed."""
    announce()
    sys.path.insert(0, "")
    with open(results, "w", encoding="utf-8") as out:

        def write(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        module = importlib.import_module(".".join(Path(file).with_suffix("").parts))
        tests = [(name, one) for name, one in vars(module).items() if name.startswith("test_") and callable(one)]
        write({"expected": [name for name, _ in tests]})
        failed = False
        for name, function in tests:
            start = time.monotonic()
            message = _error_of(function)
            failed |= bool(message)
            state, seconds = FAILED if message else PASSED, time.monotonic() - start
            write({"test": name, "state": state, "seconds": seconds, "message": message})
            print(f"{name}: {state} in {seconds:.1f} s\n{message}", flush=True)
    return int(failed)


def _error_of(function: Callable[..., object]) -> str:
    """Runs one test. Returns the end of its traceback; empty if it passed."""
    parameters = list(inspect.signature(function).parameters)
    if parameters not in ([], ["tmp_path"]):
        return f"{function.__name__}({', '.join(parameters)}): only tmp_path can be given here"
    try:
        with tempfile.TemporaryDirectory(prefix="recycle-gpu-") as folder:
            function(*([Path(folder)] if parameters else []))
    except Exception:
        return traceback.format_exc()[-_KEPT_CHARACTERS:]
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
