"""What a rank holds while ZeRO-3 builds a model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from recycle_ds.config import RunConfig


def build(rank: int, world_size: int, config: RunConfig) -> tuple[int, int, int, dict[str, Tensor], dict[str, Any]]:
    """Most bytes held while the model is made, bytes it then has, bytes of its largest parameter; gathered weights by name, and
    the rotary tables."""
    import deepspeed

    from recycle_ds.config import resolve_deepspeed
    from recycle_ds.parallel import rendezvous
    from recycle_ds.parallel.mesh import build_mesh
    from recycle_ds.training.engine import _build_model
    from recycle_ds.training.live_memory import PeakMemory

    rendezvous.start(rendezvous.detect_launch(os.environ))
    mesh = build_mesh(config.parallel)
    tree = resolve_deepspeed(config, mesh.data.size)
    with PeakMemory() as tracker:
        model, _ = _build_model(config, dict(tree), mesh, torch.device("cpu"))
    held = sum(getattr(p, "ds_tensor", p).numel() * 4 for p in model.parameters())
    largest = max(getattr(p, "ds_numel", p.numel()) * 4 for p in model.parameters())
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return tracker.peak, held, largest, weights, dict(model.named_buffers())
