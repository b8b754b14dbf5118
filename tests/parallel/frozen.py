"""What a run with a frozen backbone holds, counted in its ranks."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Any

import torch

from recycle_ds.config import RunConfig


@dataclass(frozen=True)
class Held:
    """Elements on one rank, after two steps."""

    module: int
    """Of the recycle module's local parameters."""
    backbone: int
    optimized: int
    """In the optimizer's groups: fp32 masters, or the parameters themselves."""
    moments: int
    fp32: int
    """In all fp32 tensors that the run has created, but for tables of angles."""
    gradients: list[str]
    """Parameters of the backbone with a gradient."""
    outputs: bool
    """Whether the backbone's states are part of a graph."""


def hold(rank: int, world_size: int, runs: list[RunConfig]) -> list[Held]:
    """Two steps of each run. The backbone's values are exact in bf16, as those of a model that was saved in bf16."""
    from recycle_ds.parallel import rendezvous

    rendezvous.start(rendezvous.detect_launch(os.environ))
    return [_hold(config) for config in runs]


def _hold(config: RunConfig) -> Held:
    from recycle_ds.config import resolve_deepspeed
    from recycle_ds.data.loader import BatchLoader, open_dataset
    from recycle_ds.data.tokenizer import Tokenizer
    from recycle_ds.parallel.layout import layout_of
    from recycle_ds.parallel.mesh import build_mesh
    from recycle_ds.training.batches import assemble
    from recycle_ds.training.engine.build import build_engine
    from recycle_ds.training.run_context import RunContext
    from tests.parallel.planner_reality import live

    gc.unfreeze()
    earlier = live()
    gc.freeze()
    device = torch.device("cpu")
    tree = resolve_deepspeed(config, layout_of(config.parallel, torch.distributed.get_world_size()).data)
    mesh = build_mesh(config.parallel, device)
    engine = build_engine(RunContext(config, tree, mesh))
    master, training = engine.master, config.training
    for name in master.parameters:
        if not name.startswith("recycle."):
            value = torch.full(master.shape(name), 1.0 if len(master.shape(name)) == 1 else 0.03125)
            master.write(name, "weight", value)
    master.refresh()
    loader = BatchLoader(
        open_dataset(config.data.train, Tokenizer.load(config.data.tokenizer), training.seq_length, training.seed),
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        depth=config.recycle.depth,
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
    )
    batches = assemble(loader.step(0), 1 + config.recycle.depth, mesh)
    scales = batches.scales([0.0] + [0.5] * config.recycle.depth, mesh.replicas.size)
    attached = []
    last = engine.model.final_norm or list(engine.model.blocks.values())[-1]

    def watch(_: object, __: object, output: Any) -> None:
        state = output if isinstance(output, torch.Tensor) else output[0]
        attached.append(state.requires_grad)

    hook = last.register_forward_hook(watch)
    for _ in range(2):
        engine.passes.train(batches.micro, scales)
        engine.gradients.step()
    hook.remove()
    with torch.no_grad():
        sizes = {name: torch.Size(master.shape(name)).numel() for name in master.parameters}
        module = sum(size for name, size in sizes.items() if name.startswith("recycle."))
        tables = {buffer.untyped_storage()._cdata for buffer in engine.model.buffers()}
        moments = sum(state["exp_avg"].numel() for state in engine.optimizer.state.values())
    fp32 = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.dtype == torch.float32 and item.device.type != "meta":
            storage = item.untyped_storage()
            if storage._cdata not in earlier and storage._cdata not in tables:
                fp32[storage._cdata] = storage.nbytes() // 4
    backbone = [(name, p) for name, p in engine.model.named_parameters() if not name.startswith("recycle.")]
    return Held(
        module,
        sum(sizes.values()) - module,
        sum(p.numel() for p in engine.zero.masters()),
        moments,
        sum(fp32.values()),
        [name for name, parameter in backbone if parameter.grad is not None or parameter.requires_grad],
        any(attached),
    )
