"""The memory of a real run, by unique storage, to compare with the planner's formulas."""

from __future__ import annotations

import gc
import os
import time
import warnings
from typing import Any

import torch

from recycle_ds.config import RunConfig

Storages = dict[int, torch.UntypedStorage]


def live(earlier: Storages | None = None) -> Storages:
    """The storages of all tensors that exist in this process, except the earlier ones."""
    gc.collect()
    warnings.simplefilter("ignore", FutureWarning)  # raised by torch's own objects when they are inspected
    found: Storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type != "meta":
            # a gradient that Python has not accessed yet has no Python object
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    if earlier is None or storage._cdata not in earlier:
                        found[storage._cdata] = storage
    return found


def size_of(storages: Storages) -> int:
    """Total bytes of the storages."""
    return sum(storage.nbytes() for storage in storages.values())


def measure(rank: int, world_size: int, runs: list[RunConfig]) -> list[tuple[int, int]]:
    """Per run: peak bytes of weights, gradients and optimizer state in the second step, and bytes kept for the backward
    pass with as many micro-batches in flight as in the 1F1B schedule."""
    from recycle_ds.parallel import rendezvous

    rendezvous.start(rendezvous.detect_launch(os.environ))
    return [_measure_one(config) for config in runs]


def _measure_one(config: RunConfig) -> tuple[int, int]:
    from recycle_ds.config import resolve_deepspeed
    from recycle_ds.data.loader import BatchLoader, open_dataset
    from recycle_ds.data.tokenizer import Tokenizer
    from recycle_ds.parallel.layout import layout_of
    from recycle_ds.parallel.mesh import build_mesh
    from recycle_ds.training.batches import assemble
    from recycle_ds.training.engine.build import build_engine
    from recycle_ds.training.run_context import RunContext

    gc.unfreeze()
    earlier = live()  # kept alive, so that no later storage reuses the address of one of these
    gc.freeze()  # skip existing objects in later collections: a pass over a million objects of packages takes a second
    device = torch.device("cpu")
    tree = resolve_deepspeed(config, layout_of(config.parallel, torch.distributed.get_world_size()).data)
    mesh = build_mesh(config.parallel, device)
    engine = build_engine(RunContext(config, tree, mesh))
    training = config.training
    loader = BatchLoader(
        open_dataset(config.data.train, Tokenizer.load(config.data.tokenizer), training.seq_length, training.seed),
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        depth=config.recycle.depth,
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
    )
    batches = assemble(loader.step(0), 1 + config.recycle.depth, mesh)
    scales = batches.scales([1.0] + [0.1] * config.recycle.depth, mesh.replicas.size)
    engine.passes.train(batches.micro, scales)
    engine.gradients.step()
    peak = _peak_of_a_step(engine, batches, scales, earlier)
    inputs = sum(
        t.untyped_storage().nbytes()
        for batch in batches.micro
        for t in vars(batch).values()
        if isinstance(t, torch.Tensor)
    )
    tables = sum(b.untyped_storage().nbytes() for b in engine.model.buffers())
    return peak - inputs - tables, _saved_bytes(engine, batches, scales)


def _peak_of_a_step(engine: Any, batches: Any, scales: torch.Tensor, earlier: Storages) -> int:
    """Peak bytes after a micro-batch's backward pass, before gradients are reduced and the optimizer steps."""
    held: list[int] = []

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            now = size_of(live(earlier))
            if now > max(held, default=0):
                # on a busy machine, gloo's thread holds the buffer of the last collective a moment longer than it is needed
                for _ in range(10):
                    time.sleep(0.03)
                    now = min(now, size_of(live(earlier)))
            held.append(now)
            return result

        return call

    if engine.mesh.pipeline.size > 1:  # called just before the reduction
        module = engine.engine.module
        module.get_tied_weights_and_groups = watched(module.get_tied_weights_and_groups)
    else:
        engine.engine.backward = watched(engine.engine.backward)
    engine.passes.train(batches.micro, scales)
    engine.gradients.step()
    return max(held)


def _saved_bytes(engine: Any, batches: Any, scales: torch.Tensor) -> int:
    """Bytes of the storages that a forward pass creates and that are alive after it."""
    from recycle_ds.training.benchmark.live_memory import PeakMemory
    from recycle_ds.training.engine.dry_run import _forward, _in_flight

    with PeakMemory() as tracker:
        outputs = [_forward(engine, batch, scales) for batch in _in_flight(engine, batches)]
        gc.collect()
    assert outputs
    return tracker.current
