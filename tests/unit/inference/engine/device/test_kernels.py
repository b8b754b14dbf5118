"""Attention over a paged cache, products with int8 weights: by operations and, without a GPU, by kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from recycle_ds.inference.engine.device.paged import gathered
from recycle_ds.inference.engine.device.products import widened
from tests.unit.inference.engine.device.attention_cases import check
from tests.unit.inference.engine.device.product_cases import check_products

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


def _run(argument: str, **environment: str) -> None:
    command = [sys.executable, "-m", "tests.unit.inference.engine.device.interpreted", argument]
    subprocess.run(command, check=True, timeout=300, env=os.environ | environment)


def test_gathered_attention_is_dense_attention() -> None:
    """Prevents keys of another sequence or branch, of memory that was never written, or none at all, from being seen."""
    check(gathered)


def test_products_with_int8_weights_in_operations() -> None:
    """Prevents scales of other outputs, a lost bias or a lost residual."""
    check_products(widened)


# these two run checks with assertions of their own in another process, and fail with it
@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    """Prevents the same faults in the kernels for GPUs."""
    _run("cpu", TRITON_INTERPRET="1")


@needs_triton
def test_the_kernels_compile() -> None:
    """Prevents what the interpreter lets pass: types that differ between branches or rounds of a loop, shapes of products."""
    _run("compile")
