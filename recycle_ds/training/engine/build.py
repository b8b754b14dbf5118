"""Builds a run's DeepSpeed engine and the objects around it that work alike at every ZeRO stage."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch

from recycle_ds.config.deepspeed_json import zero_stage
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.initialisation import initial_values
from recycle_ds.parallel.agree import broadcast_from
from recycle_ds.parallel.device import set_fp32_products
from recycle_ds.parallel.mesh import Mesh, ModelParallelUnit
from recycle_ds.training.engine.compiling import Compilation, compile_model
from recycle_ds.training.engine.gradients import GradientControl
from recycle_ds.training.engine.master_state import MasterState, fp32_copy, owning_replica
from recycle_ds.training.engine.optimizer import AdamW, parameter_groups, part_of
from recycle_ds.training.engine.passes import FullDepthPasses, Passes
from recycle_ds.training.engine.pipeline import PipelinePasses, RecyclePipeline, idle_group
from recycle_ds.training.engine.zero.adapter import Weights, ZeroAdapter
from recycle_ds.training.engine.zero.choice import weights_at, zero_adapter
from recycle_ds.training.run_context import RunContext

# DeepSpeed warnings that do not apply here, as the parity tests show: the optimizer is torch's AdamW with a clipping factor;
# batches and evaluation sums carry no gradient, so no hook needs to see them.
_HARMLESS_WARNINGS = ("untested optimizer", "unknown inputs or outputs type")


@dataclass(frozen=True)
class TrainingEngine:
    """DeepSpeed's engine and optimizer with this rank's part of the model, its passes, gradient control and master state, and
    the run that it was built for."""

    context: RunContext
    engine: Any
    model: RecycleGPT
    passes: Passes
    optimizer: AdamW
    zero: ZeroAdapter
    gradients: GradientControl
    master: MasterState
    zero_stage: int
    compilation: Compilation

    @property
    def mesh(self) -> Mesh:
        """The mesh of the run."""
        return self.context.mesh


def build_engine(context: RunContext, *, initial: bool = True) -> TrainingEngine:
    """Builds the model with its initial weights and wraps it. Collective over all ranks.

    initial: False leaves the weights zero until a checkpoint is loaded, since drawing 70 B numbers takes minutes. Under ZeRO-3
    weights are partitioned as they are created, so no rank ever holds the full model.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if not logger.filters:
        logger.addFilter(lambda record: not any(text in record.getMessage() for text in _HARMLESS_WARNINGS))
    config, mesh, training = context.config, context.mesh, context.config.training
    deepspeed_config = dict(context.deepspeed_config)
    set_fp32_products(training.tf32, mesh.device)
    stage = zero_stage(deepspeed_config)
    weights = weights_at(stage, mesh)
    model, frozen = _build_model(context, weights, initial)
    pipeline = mesh.pipeline.size > 1
    with redirect_stdout(StringIO()):  # hides DeepSpeed's own report; run.json describes the run
        module = RecyclePipeline(model) if pipeline else model
    optimizer = AdamW(parameter_groups(model, training.weight_decay) or idle_group(module), training)
    weights.register(model, lambda: model.head_weight)
    with redirect_stdout(StringIO()):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config,
            mpu=None if pipeline else ModelParallelUnit(mesh),  # a pipeline has its own grid, in the same order
            dist_init_required=False,
        )
    compilation = compile_model(model, config, mesh, stage)
    zero = zero_adapter(engine, optimizer, mesh, weights)
    if pipeline:
        zero.prepare_pipeline()
    passes: Passes = PipelinePasses(engine) if pipeline else FullDepthPasses(engine, model)
    separate = config.recycle.gradient == "detached"
    control = GradientControl(zero, model, optimizer, passes, training.gradient_clipping, separate=separate)
    zero.allocate_moments()
    master = MasterState(zero, model, frozen)
    return TrainingEngine(context, engine, model, passes, optimizer, zero, control, master, stage, compilation)


def _build_model(
    context: RunContext, weights: Weights, initial: bool
) -> tuple[RecycleGPT, dict[str, torch.Tensor | None] | None]:
    """The model, and fp32 host copies of the frozen weights that this replica saves (None unless training in bf16): only of
    those that bf16 rounds."""
    config, mesh, training = context.config, context.mesh, context.config.training
    with weights.creating(dict(context.deepspeed_config)):
        model = build_model(
            config.model,
            config.recycle,
            mesh,
            seed=None,
            # DeepSpeed copies its fp32 master weights from the rounded weights anyway, and a full fp32 model would set the
            # peak of device memory
            dtype=torch.bfloat16 if training.dtype == "bf16" and not weights.rounded_by_deepspeed else torch.float32,
            checkpoint_blocks=training.activation_checkpointing == "full",
            loss_chunk=training.loss_chunk,
            seq_length=training.seq_length,
        )
    model = model.to(mesh.device)
    freeze(model, config.recycle.gradient)
    kept: dict[str, torch.Tensor | None] = {}
    owners = owning_replica([name for name, _ in model.named_parameters()], mesh.replicas.size)
    for name, value in initial_values(model, config.model, mesh, training.seed if initial else None):
        parameter = model.get_parameter(name)
        weights.write(parameter, value)
        if not parameter.requires_grad and owners[name] == mesh.replicas.rank:
            kept[name] = fp32_copy(value)
    return model, kept if training.dtype == "bf16" else None


def train_on_drafts(engine: TrainingEngine, ranking: list[int] | None) -> None:
    """Restricts the module's losses to the draft vocabulary, if the run says so. ranking: all tokens, the most frequent first,
    on rank 0. Collective over all ranks."""
    recycle, mesh = engine.context.config.recycle, engine.mesh
    if recycle.draft_vocabulary_in_training and recycle.draft_vocabulary is not None:
        ids = broadcast_from(0, sorted((ranking or [])[: recycle.draft_vocabulary]), mesh)
        engine.model.train_on_drafts(torch.tensor(ids, device=mesh.device))


def freeze(model: RecycleGPT, gradient: str) -> None:
    """Under `frozen_backbone`, makes only the recycle module trainable; the head is frozen with the backbone."""
    if gradient == "frozen_backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) == "recycle")


def local_parameters(engine: TrainingEngine) -> int:
    """Number of weights that this rank holds between steps: its tensor shard of the stage, or its ZeRO-3 partition of that."""
    return sum(engine.zero.weights.stored(parameter).numel() for parameter in engine.model.parameters())
