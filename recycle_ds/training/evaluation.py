"""Validation inside a run: losses and top-1 acceptance by depth over a fixed set of samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from recycle_ds.data.loader import BatchLoader
from recycle_ds.model.recyclegpt import EvaluationSums
from recycle_ds.training.engine import TrainingEngine


@dataclass(frozen=True)
class EvaluationResult:
    """Mean losses (nats per token) and acceptance by depth, conditional on all earlier depths having agreed."""

    loss: float
    recycle_loss: list[float]
    acceptance: list[float]


def evaluate(engine: TrainingEngine, loader: BatchLoader, batches: int, device: torch.device) -> EvaluationResult:
    """Runs the first `batches` global batches of the loader. Collective over all ranks."""
    totals: torch.Tensor | None = None
    size = loader.global_batch_size
    with torch.no_grad():
        for number in range(batches):
            for batch in loader.step(number * size):
                sums: EvaluationSums = engine.engine.module(batch.to(device), None)
                stacked = torch.stack((sums.loss, sums.count, sums.agreed, sums.judged)).double()
                totals = stacked if totals is None else totals + stacked
    assert totals is not None
    if engine.mesh.data.size > 1:
        dist.all_reduce(totals, group=engine.mesh.data.group)
    loss, count, agreed, judged = totals
    means = (loss / count.clamp_min(1)).tolist()
    acceptance = (agreed / judged.clamp_min(1)).tolist()
    return EvaluationResult(means[0], means[1:], acceptance[1:])
