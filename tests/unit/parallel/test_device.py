"""What this machine is told of memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.runs import ROOT

FAULTS = """
import resource, sys, torch
from recycle_ds.parallel.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
# a small object above a block keeps it from growing at first: a block freed is then a few bytes too short for the next
for _ in range(32):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc's allocator")
def test_freed_memory_is_used_again() -> None:
    """Every step paying for the same pages anew: a block of 64 MiB is made and freed eight times over."""

    def faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
        )
        return int(done.stdout)

    kept, returned = faults("keep"), faults("return")
    assert kept < returned / 2, (kept, returned)
