"""torch.compile for training: what is compiled, when, and how long it took.

Each block and each unrolled step of the recycle module is one compiled region without a graph break, so that norms, rotary
embedding, SwiGLU, residual sums and copies run in few kernels. Blocks share their compiled code (PyTorch's "regional
compilation"), so the time to compile does not grow with the number of layers. Only a module's `forward` is replaced: hooks of
DeepSpeed or of this package run outside the compiled code.

Megatron's tensor-parallel layers start asynchronous collectives, and ZeRO 3 has hooks on every module; both break the graph.
There the functions between the matrix products are compiled instead.
"""

from __future__ import annotations

import subprocess
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
from recycle_ds.parallel.agree import SharedError, on_all_ranks
from recycle_ds.parallel.compiler import raise_recompile_limit
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.errors import TrainingError

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


def choose(setting: bool | str, mesh: Mesh, zero_stage: int) -> Compilation:
    """What `training.compile` means here. "auto" compiles on CUDA, except in a pipeline and where code cannot be compiled.

    Collective over all ranks on CUDA, unless the setting is False: they compile alike. Raises TrainingError on all
    of them if the setting is True and the code of one of them cannot be compiled.
    """
    if setting is False:
        return Compilation()
    if setting == "auto":
        if mesh.device.type != "cuda":
            return Compilation()
        if mesh.pipeline.size > 1:
            return Compilation(reason="training.compile does not work in a pipeline")
    if mesh.device.type == "cuda":
        reason = _agreed_reason(mesh)
        if reason and setting is True:
            raise TrainingError(f"training.compile=true: {reason}; mend that, or set training.compile=false")
        if reason:
            return Compilation(reason=f"{reason}; training takes longer without it")
    return Compilation(FUNCTIONS if mesh.tensor.size > 1 or zero_stage == 3 else BLOCKS)


def why_not(device: torch.device) -> str:
    """Why code for the device cannot be compiled, as one line; empty if a trivial function is compiled and runs.

    Triton may be there without the C compiler that it needs, without Python's headers, or with a cache that is not writable.
    """
    if device.type == "cuda" and not has_triton():
        return "Triton is missing or does not support this GPU"
    statistics = torch._dynamo.utils.counters["stats"]
    graphs = statistics["unique_graphs"]
    try:
        torch.compile(lambda x: x + 1, fullgraph=True, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # of torch, Triton or the C compiler, whatever their type
        return f"code for {device} cannot be compiled ({_cause(error)})"
    finally:
        statistics["unique_graphs"] = graphs  # it is no part of the model
    return ""


def _cause(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"the C compiler failed with status {error.returncode}: are Python's headers installed?"
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)[:200]


def _agreed_reason(mesh: Mesh) -> str:
    """`why_not` of a rank that has a reason, the same on all ranks. Collective over all ranks."""

    def check() -> None:
        reason = why_not(mesh.device)
        if reason:  # raised here: an error of a disk as its context would end the job
            raise TrainingError(reason)

    try:
        on_all_ranks(check, mesh)
    except SharedError as error:
        return str(error)
    return ""


def compile_model(
    model: RecycleGPT, config: RunConfig, mesh: Mesh, zero_stage: int, backend: Any = "inductor"
) -> Compilation:
    """Compiles the model's regions as the run is configured. Code is generated when each is first called. See `choose`."""
    chosen = choose(config.training.compile, mesh, zero_stage)
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
    model.loss_settings.fused = FusedLosses.compiled(compiled)


def compile_seconds() -> float:
    """Seconds that this process has spent compiling, forward and backward."""
    return float(torch._dynamo.utils.calculate_time_spent()["total_wall_time"])
