"""Checks the kernels of Triton, in its interpreter if TRITON_INTERPRET=1 was set before it is imported, and compiles them for a
GPU that need not be there."""

from __future__ import annotations

import os
import sys
from itertools import product
from typing import Any

import torch

from tests.unit.inference.engine.device.attention_cases import check
from tests.unit.inference.engine.device.product_cases import check_products


def compile_all() -> None:
    """Compiles every variant for compute capability 9.0. Needs no GPU, only the compilers that come with Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from recycle_ds.inference.engine.device import int8_kernel, paged_kernel

    def compile_one(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

    shape = {"GROUPS_PADDED": 16, "CHANNELS": 64, "CHANNELS_PADDED": 64, "BLOCK": 16, "KEYS": 64, "WIDEN": False}
    for dtype, parts in product(("bf16", "fp32"), (1, 8)):
        types = {"query": f"*{dtype}", "stored": f"*{dtype}", "mixed": f"*{dtype if parts == 1 else 'fp32'}"}
        types |= {"largest": "*fp32", "total": "*fp32", "scale": "fp32"}
        types |= dict.fromkeys(("sequences", "roots", "bits", "ends", "tables"), "*i64")
        types |= dict.fromkeys(("lowest", "table_stride", "part_length"), "i32")
        precision = {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
        compile_one(paged_kernel._attend, types, {"KV_HEADS": 3, "GROUPS": 3, "PARTS": parts, **shape, **precision})
        products = dict.fromkeys(("x", "bias", "residual", "y"), f"*{dtype}") | {"weight": "*i8", "scale": "*bf16"}
        products |= dict.fromkeys(("rows", "inputs", "outputs"), "i32")
        flags = {"BIAS": parts == 1, "RESIDUAL": True, "WIDEN": False, **precision}
        compile_one(int8_kernel._multiply, products, {"ROWS": 16, "OUTPUTS": 32, "INPUTS": 128, **flags})
    types = {"sums": "*fp32", "largest": "*fp32", "total": "*fp32", "mixed": "*bf16"}
    constants = {"CHANNELS": 64, "CHANNELS_PADDED": 64, "PARTS": 3, "PARTS_PADDED": 4}
    compile_one(paged_kernel._combine, types, constants)


def main() -> None:
    """The argument is a device, or "compile"."""
    if sys.argv[1] == "compile":
        compile_all()
        return
    assert sys.argv[1] != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
    from recycle_ds.inference.engine.device.int8_kernel import multiply
    from recycle_ds.inference.engine.device.paged_kernel import paged

    check(paged, sys.argv[1])
    check_products(multiply, sys.argv[1])
    if sys.argv[1] != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
