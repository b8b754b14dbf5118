"""torch.compile for training: what is compiled, when, and how long it took.

Each block and each unrolled step of the recycle module is one compiled region without a graph break, so that norms, rotary
embedding, SwiGLU, residual sums and copies run in few kernels. Blocks share their compiled code (PyTorch's "regional
compilation"), so the time to compile does not grow with the number of layers. Only a module's `forward` is replaced: hooks of
DeepSpeed or of this package run outside the compiled code.

Megatron's tensor-parallel layers start asynchronous collectives, and ZeRO 3 has hooks on every module; both break the graph.
There the functions between the matrix products are compiled instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.utils
from torch.utils._triton import has_triton

from recycle_ds.config import RunConfig
from recycle_ds.model import RecycleGPT
from recycle_ds.model.attention import Attention
from recycle_ds.model.losses import FusedLosses
from recycle_ds.model.mlp import MLP
from recycle_ds.model.norm import RMSNorm
from recycle_ds.parallel.compiler import raise_recompile_limit

BLOCKS, FUNCTIONS = "blocks", "functions"


@dataclass(frozen=True)
class Compilation:
    """What is compiled in this process: BLOCKS, FUNCTIONS or "" for nothing, and why nothing is if that needs a reason."""

    regions: str = ""
    reason: str = ""

    def report(self) -> str:
        """One line on what was compiled and how long that took; empty if there is nothing to say."""
        if not self.regions:
            return f"not compiled: {self.reason}" if self.reason else ""
        seconds, graphs = compile_seconds(), int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return f"compiled {self.regions}: {graphs} graphs in {seconds:.1f} s (training.compile=false turns it off)"


def choose(setting: bool | str, device: torch.device, *, tensor: int, pipeline: int, zero_stage: int) -> Compilation:
    """What `training.compile` means here. "auto" compiles on CUDA, except in a pipeline."""
    if setting is False:
        return Compilation()
    if setting == "auto":
        if device.type != "cuda":
            return Compilation()
        if pipeline > 1:
            return Compilation(reason="training.compile does not work in a pipeline")
        if not has_triton():
            return Compilation(
                reason="Triton is missing or does not support this GPU; training takes longer without it"
            )
    return Compilation(FUNCTIONS if tensor > 1 or zero_stage == 3 else BLOCKS)


def compile_model(
    model: RecycleGPT, config: RunConfig, device: torch.device, zero_stage: int, backend: Any = "inductor"
) -> Compilation:
    """Compiles the model's regions as the run is configured. Code is generated when each is first called."""
    parallel = config.parallel
    chosen = choose(
        config.training.compile, device, tensor=parallel.tensor, pipeline=parallel.pipeline, zero_stage=zero_stage
    )
    if chosen.regions:
        compile_regions(model, chosen.regions, backend)
    return chosen


def compile_regions(model: RecycleGPT, regions: str, backend: Any = "inductor") -> None:
    """Compiles blocks, recycle module and losses, or with FUNCTIONS the functions inside them and the losses."""
    raise_recompile_limit()

    def compiled(function: Callable[..., Any]) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    if regions == BLOCKS:
        whole = [*model.blocks.values(), model.recycle, model.final_norm]
        for module in whole:
            if module is not None:
                module.forward = compiled(module.forward)
    else:
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.normalise = compiled(module.normalise)
            elif isinstance(module, MLP):
                module.activate = compiled(module.activate)
            elif isinstance(module, Attention):
                module.rotate = compiled(module.rotate)
    model.fused_losses = FusedLosses.compiled(compiled)


def compile_seconds() -> float:
    """Seconds that this process has spent compiling, forward and backward."""
    return float(torch._dynamo.utils.calculate_time_spent()["total_wall_time"])
