"""The memory allocator, the arithmetic of products, and the rate that they are measured at."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from recycle_ds.parallel import device
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


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "tf32"])
def test_the_rate_is_measured_on_random_numbers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a rate that is too high: a GPU multiplies ones and zeros some 13 % faster than a model's numbers. Also a run
    whose random numbers depend on how often its rate was measured."""
    measured: list[torch.Tensor] = []

    def timed(a: torch.Tensor, _: torch.device) -> float:
        measured.append(a)
        return 1.0

    monkeypatch.setattr(device, "_timed_product", timed)
    before = torch.random.get_rng_state()
    device.matmul_rate(dtype, torch.device("cpu"))
    assert measured[0].dtype == device.torch_dtype(dtype)
    assert measured[0].float().unique().numel() > 100 and 0.9 < measured[0].float().std() < 1.1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_slow_product_does_not_set_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an MFU of 300,000 %: the first product of a process prepares its kernel, which on busy cores takes longer than a
    product of the size that the search is for."""
    products = 0

    def timed(a: torch.Tensor, _: torch.device) -> float:
        nonlocal products
        products += 1
        return 1.0 if products == 1 else 2 * len(a) ** 3 / 1e11

    monkeypatch.setattr(device, "_timed_product", timed)
    assert device.matmul_rate("bf16", torch.device("cpu")) == pytest.approx(1e11)


def test_tf32_is_set_for_gpus_only_and_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents fp32 runs that stay in TF32 after one that wanted it, and CPU products that round to bf16."""
    found: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    for tf32 in (True, False):
        device.set_fp32_products(tf32, torch.device("cuda"))
        device.set_fp32_products(tf32, torch.device("cpu"))
    assert found == ["high", "highest"]
