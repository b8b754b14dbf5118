"""Builds and initialises a model."""

from __future__ import annotations

import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model.initialisation import initialise
from recycle_ds.model.recyclegpt import RecycleGPT
from recycle_ds.model.sharding import canonical_shapes, pieces
from recycle_ds.parallel.layout import Layout
from recycle_ds.parallel.mesh import Mesh, virtual_mesh


def whole_shapes(config: ModelConfig, recycle: RecycleConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every canonical tensor of the full model, independent of this rank's shard."""
    mesh = virtual_mesh(Layout(), 0)
    with torch.device("meta"):
        model = RecycleGPT(config, recycle, mesh)
    return canonical_shapes(pieces(model, mesh))


def build_model(
    config: ModelConfig,
    recycle: RecycleConfig,
    mesh: Mesh | None = None,
    *,
    seed: int | None = 0,
    dtype: torch.dtype = torch.float32,
    checkpoint_blocks: bool = False,
    loss_chunk: int = 1024,
    seq_length: int | None = None,
    blocks: range | None = None,
) -> RecycleGPT:
    """Builds this rank's shard of a model. Raises ConfigError when there are more pipeline stages than blocks.

    mesh=None means a single process. seed=None leaves the weights uninitialised, for a checkpoint to be loaded.
    seq_length is the training sequence length, which affects how blocks are distributed over pipeline stages; blocks
    are those of this stage, if they are distributed in another way."""
    mesh = mesh or Mesh()
    model = RecycleGPT(
        config,
        recycle,
        mesh,
        dtype=dtype,
        checkpoint_blocks=checkpoint_blocks,
        loss_chunk=loss_chunk,
        seq_length=seq_length,
        blocks=blocks,
    )
    if seed is not None:
        initialise(model, config, mesh, seed)
    return model
