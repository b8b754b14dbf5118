"""Builds the DeepSpeed engine of a run, and the pieces around it that hide the ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from recycle_ds.config import RunConfig
from recycle_ds.config.deepspeed_json import zero_stage
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.parallel.mesh import Mesh, ModelParallelUnit
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.gradients import GradientControl
from recycle_ds.training.master import MasterState, keeper
from recycle_ds.training.optimizer import AdamW, parameter_groups, part_of


@dataclass(frozen=True)
class TrainingEngine:
    """DeepSpeed's engine with the model in it, its gradient control and its master state."""

    engine: Any
    model: RecycleGPT
    optimizer: AdamW
    gradients: GradientControl
    master: MasterState
    mesh: Mesh
    zero_stage: int


def build_engine(
    config: RunConfig, deepspeed_config: dict[str, Any], mesh: Mesh, device: torch.device
) -> TrainingEngine:
    """Builds the model with its initial weights and wraps it. Collective over all ranks.

    Raises TrainingError for combinations that DeepSpeed computes wrongly.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # the optimizer is torch's AdamW with a factor before it: parity over the stages is what the tests show
    if not logger.filters:
        logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    training = config.training
    stage = zero_stage(deepspeed_config)
    if stage == 0 and mesh.tensor.size > 1 and training.dtype == "bf16":
        raise TrainingError(
            f"ZeRO 0 with bf16 at parallel.tensor={mesh.tensor.size} gives wrong gradient norms in DeepSpeed: use zero1.json"
        )
    model = build_model(
        config.model,
        config.recycle,
        mesh,
        seed=training.seed,
        checkpoint_blocks=training.activation_checkpointing == "full",
        loss_chunk=training.loss_chunk,
    ).to(device)
    freeze(model, config.recycle.gradient)
    frozen = _keep_frozen(model, mesh) if training.dtype == "bf16" else None
    optimizer = AdamW(parameter_groups(model, training.weight_decay), training)
    if stage == 3:
        # used by the root module (the head) as well as by its own: ZeRO-3 must gather it for both
        deepspeed.zero.register_external_parameter(model, model.head_weight)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config,
        mpu=ModelParallelUnit(mesh),
        dist_init_required=False,
    )
    if training.compile:
        engine.compile()
    separate = config.recycle.gradient == "detached"
    control = GradientControl(engine, optimizer, mesh, training.gradient_clipping, separate=separate)
    master = MasterState(engine, optimizer, frozen)
    master.allocate_moments()
    return TrainingEngine(engine, model, optimizer, control, master, mesh, stage)


def freeze(model: RecycleGPT, gradient: str) -> None:
    """Leaves only the module trainable under `frozen_backbone`; the head is frozen with the backbone."""
    if gradient == "frozen_backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) == "recycle")


def _keep_frozen(model: RecycleGPT, mesh: Mesh) -> dict[str, torch.Tensor]:
    """fp32 copies, in host memory, of the frozen weights that this data rank keeps: DeepSpeed rounds the rest to bf16."""
    parameters = dict(model.named_parameters())
    ranks = keeper(list(parameters), mesh.data.size)
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in parameters.items()
        if not parameter.requires_grad and ranks[name] == mesh.data.rank
    }


def local_parameters(engine: TrainingEngine) -> int:
    """Weights that this rank holds between steps: its tensor shard, and of that its ZeRO-3 partition."""
    count = 0
    for parameter in engine.model.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        count += parameter.numel() if partition is None else partition.ds_numel
    return count
