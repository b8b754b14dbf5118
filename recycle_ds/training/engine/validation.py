"""Validation during a run: losses, top-1 acceptance by depth and tokens per call over a fixed set of samples."""

from __future__ import annotations

import torch
import torch.distributed as dist

from recycle_ds.data.loader import BatchLoader
from recycle_ds.model.acceptance import SUMS, EvaluationResult
from recycle_ds.training.batches import local_batches
from recycle_ds.training.engine.build import TrainingEngine


def evaluate(engine: TrainingEngine, loader: BatchLoader, batches: int) -> EvaluationResult:
    """Runs the first `batches` global batches of the loader. Collective over all ranks."""
    mesh, size = engine.mesh, loader.global_batch_size
    totals = torch.zeros(SUMS, 1 + engine.model.depth, dtype=torch.float64, device=mesh.device)
    for number in range(batches):
        totals += engine.passes.evaluate(local_batches(loader.step(number * size), mesh))
    # tensor and ulysses ranks of the last stage hold the same sums: only one of them may count
    if not (mesh.last_stage and mesh.tensor.rank == 0 and mesh.ulysses.rank == 0):
        totals.zero_()
    if mesh.world_size > 1:
        dist.all_reduce(totals)
    return EvaluationResult.of(totals)
