"""Builds and initialises a model."""

from __future__ import annotations

import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model.initialisation import initialise
from recycle_ds.model.recyclegpt import RecycleGPT
from recycle_ds.parallel.mesh import Mesh


def build_model(
    config: ModelConfig,
    recycle: RecycleConfig,
    mesh: Mesh | None = None,
    *,
    seed: int | None = 0,
    dtype: torch.dtype = torch.float32,
    checkpoint_blocks: bool = False,
    loss_chunk: int = 1024,
) -> RecycleGPT:
    """This rank's part of a model. mesh None is a single process; seed None leaves weights to a checkpoint."""
    mesh = mesh or Mesh()
    model = RecycleGPT(config, recycle, mesh, dtype=dtype, checkpoint_blocks=checkpoint_blocks, loss_chunk=loss_chunk)
    if seed is not None:
        initialise(model, config, mesh, seed)
    return model
