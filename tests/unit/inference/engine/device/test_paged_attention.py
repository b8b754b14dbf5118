"""Attention over a paged cache: in PyTorch's operations, and by Triton's kernels in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from recycle_ds.inference.engine.device.paged import gathered
from tests.unit.inference.engine.device.attention_cases import check


def test_gathered_attention_is_dense_attention() -> None:
    """Prevents keys of another sequence or branch, of memory that was never written, or none at all, from being seen."""
    check(gathered)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_the_kernels_are_dense_attention() -> None:
    """Prevents the same faults in the kernels for GPUs, without one."""
    command = [sys.executable, "-m", "tests.unit.inference.engine.device.attention_cases"]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"TRITON_INTERPRET": "1"})
