"""run.json: the layout that was built, and how many parameters each rank holds."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from recycle_ds.config.atomic_files import write_json_atomically
from recycle_ds.model.flops import parameters
from recycle_ds.training.engine.build import TrainingEngine, local_parameters


def write_layout_file(engine: TrainingEngine) -> None:
    """Writes run_dir/run.json from the process groups that were built, and prints one line. Collective."""
    config, mesh = engine.context.config, engine.mesh
    counts = [torch.zeros(1, dtype=torch.int64, device=mesh.device) for _ in range(mesh.world_size)]
    dist.all_gather(counts, torch.tensor([local_parameters(engine)], dtype=torch.int64, device=mesh.device))
    total = parameters(config.model, config.recycle)
    if not mesh.is_first:
        return
    record = {
        "world_size": mesh.world_size,
        "tensor": mesh.tensor.size,
        "pipeline": mesh.pipeline.size,
        "data": mesh.data.size,
        "sequence": mesh.sequence,
        "ulysses": mesh.ulysses.size,
        "zero_stage": engine.zero_stage,
        "dtype": config.training.dtype,
        "parameters": total,
        "parameters_per_rank": [int(count) for count in counts],
    }
    write_json_atomically(Path(config.run_dir) / "run.json", record)
    degrees = {
        f"tensor {mesh.tensor.size}{' (sequence-parallel)' if mesh.sequence else ''}": True,
        f"pipeline {mesh.pipeline.size}": mesh.pipeline.size > 1,
        f"ulysses {mesh.ulysses.size}": mesh.ulysses.size > 1,
        f"data {mesh.data.size}": True,
    }
    shown = " x ".join(text for text, wanted in degrees.items() if wanted)
    layout = f"{shown}, ZeRO {engine.zero_stage}, {config.training.dtype}"
    print(f"{total / 1e6:.1f} M parameters on {mesh.world_size} rank(s) of {mesh.device.type}: {layout}", flush=True)
