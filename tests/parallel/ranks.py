"""Functions that several test modules run on every rank."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recycle_ds.config import RecycleError, RunConfig


def run_all(rank: int, world_size: int, runs: list[RunConfig]) -> list[str]:
    """Runs several configurations in one set of processes. Returns for each the reason for its end, or its error."""
    from recycle_ds.parallel import rendezvous
    from recycle_ds.pretrain import run

    rendezvous.start(rendezvous.detect_launch(os.environ))
    endings = []
    for config in runs:
        try:
            endings.append(run(config))
        except RecycleError as error:
            endings.append(f"error: {error}")
    return endings


def run_own(rank: int, world_size: int, runs: list[RunConfig]) -> str:
    """Like `run_all`, with a configuration for each rank, as if each host had files of its own."""
    return run_all(rank, world_size, [runs[rank]])[0]


def run_quietly(rank: int, world_size: int, runs: list[RunConfig]) -> list[tuple[str, str]]:
    """Like `run_all`, but also returns the output of each run."""
    import contextlib
    import io

    endings = []
    for config in runs:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            (ending,) = run_all(rank, world_size, [config])
        endings.append((ending, output.getvalue()))
    return endings


@dataclass
class Fault:
    """A fault on one rank in one step: its states are multiplied by `factor`, in the first `times` attempts."""

    config: RunConfig
    step: int
    rank: int
    times: int = 1_000_000
    factor: float = math.nan
    stop_file: bool = False
    """Whether a file requests the run to stop instead."""


def run_faulty(rank: int, world_size: int, faults: list[Fault]) -> list[str]:
    """Like `run_all`, with a fault in each run."""
    from recycle_ds.training import loop

    original = loop.Trainer._step

    def faulty(trainer: Any, stop: Any) -> Any:
        fault = current[0]
        if (trainer.state.step + 1, rank) != (fault.step, fault.rank) or fault.times == 0:
            return original(trainer, stop)
        fault.times -= 1
        if fault.stop_file:
            Path(fault.config.run_dir, "stop").touch()
            return original(trainer, stop)
        model = trainer.engine.model
        # with a pipeline, each stage sends the output of this module
        module = model.final_norm or list(model.blocks.values())[-1].mlp
        hook = module.register_forward_hook(lambda *_: _[2] * fault.factor)
        try:
            return original(trainer, stop)
        finally:
            hook.remove()

    endings: list[str] = []
    loop.Trainer._step = faulty  # type: ignore[method-assign]
    try:
        for fault in faults:
            current = [fault]
            endings += run_all(rank, world_size, [fault.config])
    finally:
        loop.Trainer._step = original  # type: ignore[method-assign]
    return endings


def run_poisoned(rank: int, world_size: int, runs: list[tuple[RunConfig, int, int]]) -> list[str]:
    """Like `run_all` for (configuration, step, rank): that rank's loss of that step is NaN in every attempt."""
    return run_faulty(rank, world_size, [Fault(*case) for case in runs])


def run_on_full_disk(rank: int, world_size: int, config: RunConfig, step: int) -> str:
    """Like `run_all` for one configuration; the disk of rank 1 is full when the checkpoint of `step` is written."""
    import errno

    from recycle_ds.checkpoint.files import safetensors_writer

    original = safetensors_writer.save_file

    def full(tensors: Any, path: str, **options: Any) -> None:
        if rank == 1 and f"step-{step:08d}" in path:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        original(tensors, path, **options)

    safetensors_writer.save_file = full
    try:
        return run_all(rank, world_size, [config])[0]
    finally:
        safetensors_writer.save_file = original


def run_and_read_timeouts(rank: int, world_size: int, config: RunConfig) -> list[float]:
    """Like `run_all` for one configuration; returns the collective timeout of each group afterwards, in seconds."""
    from torch.distributed import distributed_c10d as c10d

    run_all(rank, world_size, [config])
    backends = [group._get_backend(torch.device("cpu")) for group in c10d._world.pg_map]
    return [backend.options._timeout.total_seconds() for backend in backends]


def run_with_small_shards(rank: int, world_size: int, runs: list[RunConfig], shard_bytes: int) -> list[str]:
    """Like `run_all`, with checkpoints in files of about `shard_bytes` instead of a gibibyte."""
    from recycle_ds.checkpoint.run import shard_writer

    original = shard_writer.SHARD_BYTES
    shard_writer.SHARD_BYTES = shard_bytes
    try:
        return run_all(rank, world_size, runs)
    finally:
        shard_writer.SHARD_BYTES = original


def run_taken_over(rank: int, world_size: int, config: RunConfig, moment: str) -> str:
    """Like `run_all` for one configuration. After the first checkpoint, another start takes over the folder.

    moment: "step" for the next step, "publish" for the time just before the next checkpoint is published, or "cleanup"
    and "writing" for a start that deletes the temporary files while the checkpoint is published or written.
    """
    import shutil

    from recycle_ds.checkpoint.run import saving as writing
    from recycle_ds.checkpoint.run.lock import RunLock
    from recycle_ds.parallel.peers import TakenOver

    folder = Path(config.run_dir) / "checkpoints"
    holder: list[str] = []
    finish, publish = writing.PortableCheckpointer.finish, writing.PortableCheckpointer._publish

    def take(when: str) -> None:
        if moment == when and (folder / "latest").exists():
            holder.append("process 1 on elsewhere (job 8)")

    def finish_late(checkpointer: Any) -> Path | None:
        take("publish")
        take("writing")
        if holder and moment == "writing" and rank == 1:
            checkpointer._save.writer.wait = lambda: "No such file or directory"
        return finish(checkpointer)

    def publish_after_cleanup(checkpointer: Any, save: Any) -> None:
        take("cleanup")
        if holder:
            shutil.rmtree(save.temporary)
        publish(checkpointer, save)

    def taken_by(lock: Any) -> str | None:
        if not list(folder.glob(".tmp-*")):
            take("step")
        return holder[0] if holder else None

    patches = {
        (RunLock, "taken_by"): taken_by,
        (writing.PortableCheckpointer, "finish"): finish_late,
        (writing.PortableCheckpointer, "_publish"): publish_after_cleanup,
    }
    originals = {target: getattr(*target) for target in patches}
    for (owner, name), patch in patches.items():
        setattr(owner, name, patch)
    try:
        return run_all(rank, world_size, [config])[0]
    except TakenOver as error:
        return f"taken over: {error}"
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


BREAKAGES = ("norm_gradients", "head_norm_gradients", "tied_embedding", "recycle_scale")


def run_broken(rank: int, world_size: int, config: RunConfig, breakage: str) -> str:
    """Like `run_all` for one configuration with one reduction omitted: the negative controls of the parity suite."""
    from recycle_ds.model import norm
    from recycle_ds.training import batches
    from recycle_ds.training.engine import pipeline

    def unreduced(weight: Any, group: Any) -> Any:
        return weight

    def untied(module: Any) -> list[Any]:
        return []

    scales = batches.StepBatches.scales

    def unscaled(step: Any, weights: Any, replicas: int) -> Any:
        found = scales(step, weights, replicas)
        return torch.cat((found[:1], found[1:] / replicas))

    owner, name, broken = {
        "norm_gradients": (norm, "copy_to_tensor_model_parallel_region", unreduced),
        "head_norm_gradients": (norm, "copy_to_tensor_model_parallel_region", unreduced),
        "tied_embedding": (pipeline.RecyclePipeline, "get_tied_weights_and_groups", untied),
        "recycle_scale": (batches.StepBatches, "scales", unscaled),
    }[breakage]
    original = getattr(owner, name)
    setattr(owner, name, broken)
    try:
        return run_all(rank, world_size, [config])[0]
    finally:
        setattr(owner, name, original)
