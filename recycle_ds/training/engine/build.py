"""Builds a run's DeepSpeed engine and the objects around it that work alike at every ZeRO stage."""

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
from recycle_ds.parallel.agree import broadcast_from
from recycle_ds.parallel.device import set_fp32_products
from recycle_ds.parallel.mesh import Mesh, ModelParallelUnit
from recycle_ds.training.engine.gradients import GradientControl
from recycle_ds.training.engine.master_state import MasterState, fp32_copy, owning_replica, write_partition
from recycle_ds.training.engine.optimizer import AdamW, idle_group, parameter_groups, part_of
from recycle_ds.training.engine.passes import FullDepthPasses, Passes
from recycle_ds.training.engine.pipeline import PipelinePasses, RecyclePipeline

# DeepSpeed warnings that do not apply here, as the parity tests show: the optimizer is torch's AdamW with a clipping factor;
# batches and evaluation sums carry no gradient, so no hook needs to see them.
_HARMLESS_WARNINGS = ("untested optimizer", "unknown inputs or outputs type")


@dataclass(frozen=True)
class TrainingEngine:
    """DeepSpeed's engine with this rank's part of the model, its passes, gradient control and master state."""

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

    initial: False leaves the weights zero until a checkpoint is loaded, since drawing 70 B numbers takes minutes.
    deepspeed_config: returned by `resolve_deepspeed`, which rejects what DeepSpeed computes wrongly. Under ZeRO-3 weights are
    partitioned as they are created, so no rank ever holds the full model.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if not logger.filters:
        logger.addFilter(lambda record: not any(text in record.getMessage() for text in _HARMLESS_WARNINGS))
    training = config.training
    set_fp32_products(training.tf32, device)
    stage = zero_stage(deepspeed_config)
    model, frozen = _build_model(config, deepspeed_config, mesh, device, initial)
    pipeline = mesh.pipeline.size > 1
    with redirect_stdout(StringIO()):  # hides DeepSpeed's own report; run.json describes the run
        module = RecyclePipeline(model) if pipeline else model
    optimizer = AdamW(parameter_groups(model, training.weight_decay) or idle_group(module), training)
    if stage == 3:
        # the root module uses this weight too, not only its owner: ZeRO-3 must gather it for both
        deepspeed.zero.register_external_parameter(model, model.head_weight)
    with redirect_stdout(StringIO()):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config,
            mpu=None if pipeline else ModelParallelUnit(mesh),  # a pipeline has its own grid, in the same order
            dist_init_required=False,
        )
    if training.compile:
        engine.compile()
    passes: Passes = PipelinePasses(engine) if pipeline else FullDepthPasses(engine, model)
    separate = config.recycle.gradient == "detached"
    control = GradientControl(engine, model, optimizer, passes, training.gradient_clipping, separate=separate)
    master = MasterState(engine, model, optimizer, frozen)
    master.allocate_moments()
    return TrainingEngine(engine, model, passes, optimizer, control, master, mesh, stage)


def _build_model(
    config: RunConfig, deepspeed_config: dict[str, Any], mesh: Mesh, device: torch.device, initial: bool
) -> tuple[RecycleGPT, dict[str, torch.Tensor | None] | None]:
    """The model, and fp32 host copies of the frozen weights that this replica saves (None unless training in bf16): only of
    those that bf16 rounds."""
    import deepspeed

    training = config.training
    partitioned = zero_stage(deepspeed_config) == 3
    partitioning: AbstractContextManager[Any] = nullcontext()
    if partitioned:
        # with `mpu` alone it would partition over all ranks, tensor ranks included
        partitioning = deepspeed.zero.Init(
            data_parallel_group=mesh.replicas.group,
            mpu=ModelParallelUnit(mesh),
            config_dict_or_path=deepspeed_config,
            mem_efficient_linear=False,
        )
    with partitioning:
        model = build_model(
            config.model,
            config.recycle,
            mesh,
            seed=None,
            # DeepSpeed copies its fp32 master weights from the rounded weights anyway, and a full fp32 model would set the
            # peak of device memory. ZeRO-3 rounds each weight as it partitions it
            dtype=torch.bfloat16 if training.dtype == "bf16" and not partitioned else torch.float32,
            checkpoint_blocks=training.activation_checkpointing == "full",
            loss_chunk=training.loss_chunk,
            seq_length=training.seq_length,
        )
    model = model.to(device)
    freeze(model, config.recycle.gradient)
    kept: dict[str, torch.Tensor | None] = {}
    owners = owning_replica([name for name, _ in model.named_parameters()], mesh.replicas.size)
    for name, value in initial_values(model, config.model, mesh, training.seed if initial else None):
        parameter = model.get_parameter(name)
        if partitioned:
            write_partition(parameter, value, mesh.replicas.size, mesh.replicas.rank)
        else:
            parameter.data.copy_(value)
        if not parameter.requires_grad and owners[name] == mesh.replicas.rank:
            kept[name] = fp32_copy(value)
    return model, kept if training.dtype == "bf16" else None


def train_on_drafts(engine: TrainingEngine, config: RunConfig, ranking: list[int] | None, device: torch.device) -> None:
    """Restricts the module's losses to the draft vocabulary, if the run says so. ranking: all tokens, the most frequent first,
    on rank 0. Collective over all ranks."""
    count = config.recycle.draft_vocabulary
    if config.recycle.draft_vocabulary_in_training and count is not None:
        ids = broadcast_from(0, sorted((ranking or [])[:count]), engine.mesh, device)
        engine.model.train_on_drafts(torch.tensor(ids, device=device))


def freeze(model: RecycleGPT, gradient: str) -> None:
    """Under `frozen_backbone`, makes only the recycle module trainable; the head is frozen with the backbone."""
    if gradient == "frozen_backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) == "recycle")


def local_parameters(engine: TrainingEngine) -> int:
    """Number of weights that this rank holds between steps: its tensor shard of the stage, or its ZeRO-3 partition of that."""
    count = 0
    for parameter in engine.model.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        count += parameter.numel() if partition is None else partition.ds_numel
    return count
