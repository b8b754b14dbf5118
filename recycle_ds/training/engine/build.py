"""Builds the DeepSpeed engine of a run, and the pieces around it that hide the ZeRO stage."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch

from recycle_ds.config import RunConfig
from recycle_ds.config.deepspeed_json import zero_stage
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.initialisation import initial_values
from recycle_ds.parallel.mesh import Mesh, ModelParallelUnit
from recycle_ds.training.engine.gradients import GradientControl
from recycle_ds.training.engine.master_state import MasterState, keeper, write_partition
from recycle_ds.training.engine.optimizer import AdamW, parameter_groups, part_of
from recycle_ds.training.engine.passes import Passes, WholePasses
from recycle_ds.training.engine.pipeline import PipelinePasses, RecyclePipeline

# Warnings of DeepSpeed's that the parity tests answer: the optimizer is torch's AdamW with a factor before it; batches and the
# sums of an evaluation carry no gradient, so no hook needs to see them.
_UNFOUNDED = ("untested optimizer", "unknown inputs or outputs type")


@dataclass(frozen=True)
class TrainingEngine:
    """DeepSpeed's engine with this rank's part of the model in it, its passes, gradient control and master state."""

    engine: Any
    model: RecycleGPT
    passes: Passes
    optimizer: AdamW
    gradients: GradientControl
    master: MasterState
    mesh: Mesh
    zero_stage: int


def build_engine(
    config: RunConfig, deepspeed_config: dict[str, Any], mesh: Mesh, device: torch.device, *, initial: bool = True
) -> TrainingEngine:
    """Builds the model with its initial weights and wraps it. Collective over all ranks.

    initial False leaves zeros where a checkpoint's weights follow: drawing 70 B numbers takes minutes at every restart.
    deepspeed_config is what `resolve_deepspeed` returned, which refuses what DeepSpeed computes wrongly. Under ZeRO-3 the
    weights are partitioned as they are made: no rank ever holds the whole model.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if not logger.filters:
        logger.addFilter(lambda record: not any(text in record.getMessage() for text in _UNFOUNDED))
    training = config.training
    stage = zero_stage(deepspeed_config)
    model, frozen = _build_model(config, deepspeed_config, mesh, device, initial)
    optimizer = AdamW(parameter_groups(model, training.weight_decay), training)
    pipeline = mesh.pipeline.size > 1
    if stage == 3:
        # used by the root module (the head) as well as by its own: ZeRO-3 must gather it for both
        deepspeed.zero.register_external_parameter(model, model.head_weight)
    with redirect_stdout(StringIO()):  # layers, topology, memory: what went into a run is told in run.json
        engine, *_ = deepspeed.initialize(
            model=RecyclePipeline(model) if pipeline else model,
            optimizer=optimizer,
            config=deepspeed_config,
            mpu=None
            if pipeline
            else ModelParallelUnit(mesh),  # a pipeline answers from its own grid, in the same order
            dist_init_required=False,
        )
    if training.compile:
        engine.compile()
    passes: Passes = PipelinePasses(engine) if pipeline else WholePasses(engine, model)
    separate = config.recycle.gradient == "detached"
    control = GradientControl(engine, model, optimizer, passes, training.gradient_clipping, separate=separate)
    master = MasterState(engine, model, optimizer, frozen)
    master.allocate_moments()
    return TrainingEngine(engine, model, passes, optimizer, control, master, mesh, stage)


def _build_model(
    config: RunConfig, deepspeed_config: dict[str, Any], mesh: Mesh, device: torch.device, initial: bool
) -> tuple[RecycleGPT, dict[str, torch.Tensor] | None]:
    """The model, and fp32 host copies of the frozen weights that this replica keeps where DeepSpeed rounds to bf16."""
    import deepspeed

    training = config.training
    partitioned = zero_stage(deepspeed_config) == 3
    whole: AbstractContextManager[Any] = nullcontext()
    if partitioned:
        # its mpu argument alone would partition over the world, tensor ranks included
        whole = deepspeed.zero.Init(
            data_parallel_group=mesh.replicas.group,
            mpu=ModelParallelUnit(mesh),
            config_dict_or_path=deepspeed_config,
            mem_efficient_linear=False,
        )
    with whole:
        model = build_model(
            config.model,
            config.recycle,
            mesh,
            seed=None,
            # DeepSpeed's fp32 masters start from the rounded weights either way; whole fp32 ones would be the largest thing
            # that ever lies on the device. ZeRO-3 rounds each weight as it partitions it
            dtype=torch.bfloat16 if training.dtype == "bf16" and not partitioned else torch.float32,
            checkpoint_blocks=training.activation_checkpointing == "full",
            loss_chunk=training.loss_chunk,
            seq_length=training.seq_length,
        )
    model = model.to(device)
    freeze(model, config.recycle.gradient)
    kept: dict[str, torch.Tensor] = {}
    ranks = keeper([name for name, _ in model.named_parameters()], mesh.replicas.size)
    for name, value in initial_values(model, config.model, mesh, training.seed if initial else None):
        parameter = model.get_parameter(name)
        if partitioned:
            write_partition(parameter, value, mesh.replicas.size, mesh.replicas.rank)
        else:
            parameter.data.copy_(value)
        if not parameter.requires_grad and ranks[name] == mesh.replicas.rank:
            kept[name] = value
    return model, kept if training.dtype == "bf16" else None


def freeze(model: RecycleGPT, gradient: str) -> None:
    """Leaves only the module trainable under `frozen_backbone`; the head is frozen with the backbone."""
    if gradient == "frozen_backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) == "recycle")


def local_parameters(engine: TrainingEngine) -> int:
    """Weights that this rank holds between steps: its stage's tensor shard, and of that its ZeRO-3 partition."""
    count = 0
    for parameter in engine.model.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        count += parameter.numel() if partition is None else partition.ds_numel
    return count
