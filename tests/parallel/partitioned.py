"""The memory of a rank while ZeRO-3 builds a model, and after training steps."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from recycle_ds.config import RunConfig


def build(rank: int, world_size: int, config: RunConfig) -> tuple[int, int, int, dict[str, Tensor], dict[str, Any]]:
    """Peak bytes while the model is built, bytes of the built model, bytes of its largest parameter, gathered weights
    by name, and rotary tables by name."""
    import deepspeed

    from recycle_ds.config import resolve_deepspeed
    from recycle_ds.parallel import rendezvous
    from recycle_ds.parallel.mesh import build_mesh
    from recycle_ds.training.benchmark.live_memory import PeakMemory
    from recycle_ds.training.engine.build import _build_model
    from recycle_ds.training.engine.zero.choice import weights_at
    from recycle_ds.training.run_context import RunContext

    rendezvous.start(rendezvous.detect_launch(os.environ))
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    context = RunContext(config, resolve_deepspeed(config, mesh.data.size), mesh)
    with PeakMemory() as tracker:
        model, _ = _build_model(context, weights_at(3, mesh), initial=True)
    held = sum(getattr(p, "ds_tensor", p).numel() * 4 for p in model.parameters())
    largest = max(getattr(p, "ds_numel", p.numel()) * 4 for p in model.parameters())
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return tracker.peak, held, largest, weights, dict(model.named_buffers())


def memory_after_steps(rank: int, world_size: int, config: RunConfig) -> tuple[int, int, int, int]:
    """After two steps of the benchmark's subject: number of weights, bytes of its state and of other persistent tensors
    as the subject counts them, and bytes of all live tensors except batches and rotary tables."""
    from recycle_ds.config import resolve_deepspeed
    from recycle_ds.parallel import rendezvous
    from recycle_ds.parallel.mesh import build_mesh
    from recycle_ds.training.benchmark.live_memory import bytes_of
    from recycle_ds.training.benchmark.subjects import OurSubject
    from recycle_ds.training.run_context import RunContext
    from tests.parallel.planner_reality import live, size_of

    rendezvous.start(rendezvous.detect_launch(os.environ))
    earlier = live()
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    subject = OurSubject(RunContext(config, resolve_deepspeed(config, mesh.data.size), mesh))
    subject.step()
    subject.step()
    held = subject.held()
    values = [value for batch in subject._batches.micro for value in vars(batch).values()]
    batches = [value for value in values if isinstance(value, Tensor)]
    others = bytes_of([*batches, *subject.engine.model.buffers()])
    return held.parameters, bytes_of(held.state), bytes_of(held.beside), size_of(live(earlier)) - others
