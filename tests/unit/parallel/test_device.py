"""The configuration of the memory allocator."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.runs import ROOT

SCRIPT = """
import resource, sys, torch
from recycle_ds.parallel.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
# warm up: at first a small object above a freed block can leave it a few bytes too short for the next tensor
for _ in range(32):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="configures glibc's allocator")
def test_freed_memory_is_used_again() -> None:
    """Prevents page faults for the same memory at every step: a block of 64 MiB is allocated and freed eight times."""

    def faults(mode: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
        )
        return int(done.stdout)

    kept, returned = faults("keep"), faults("return")
    assert kept < returned / 2, (kept, returned)
