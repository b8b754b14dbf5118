"""A stage of the model under DeepSpeed's PipelineModule and its 1F1B schedule.

The module's "layers" are the stages themselves, one per rank: `recycle_ds.model.stages` decides which blocks a stage holds.
Every rank of a pipeline has the full batch, so only the residual stream is sent between stages.

What DeepSpeed's PipelineEngine forces, and why:
- its own grid of ranks instead of an mpu (`RecyclePipeline`): it builds the groups that it sends and reduces over from one;
- a stage that takes one tensor and returns one (`Stage`): it sends tensors only, and passes the batch to the first and the last
  stage only. A stage therefore takes micro-batches from an iterator, in the schedule's order, and the engine a placeholder;
- the loss times the number of micro-batches (`Stage.forward`): its backward pass divides by it regardless;
- a trainable parameter on every rank (`Stage.idle`, `idle_group`): its optimizers need one, and a frozen backbone leaves none;
- a gradient of the tied embedding on both ends (`get_tied_weights_and_groups`): it leaves out a weight without one, and the
  other end would wait for ever. With bf16 it reads another attribute: see `prepare_pipeline` in `zero`;
- schedules without its optimizer step (`_GradientSchedule`): ranks must agree before the update whether to apply it;
- calls of `_exec_schedule` and `_exec_optimizer_step`: `train_batch` runs both at once, and synchronises to average the loss;
- refusals at start-up, with their reasons in `recycle_ds.config.deepspeed_json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar

import torch
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    InferenceSchedule,
    OptimizerStep,
    ReduceGrads,
    TrainSchedule,
)
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from recycle_ds.data.loader import Batch
from recycle_ds.model.acceptance import SUMS
from recycle_ds.model.recyclegpt import RecycleGPT
from recycle_ds.parallel.layout import Layout
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.engine.optimizer import RECYCLE
from recycle_ds.training.engine.zero.adapter import Uses
from recycle_ds.training.engine.zero.internals import moved, other_version


class Stage(nn.Module):
    """This rank's stage, fed with micro-batches in the schedule's order."""

    def __init__(self, model: RecycleGPT) -> None:
        super().__init__()
        self.model = model
        self.sums = torch.zeros(0)
        self._micro: Iterator[Batch] = iter(())
        self._scales: Tensor | None = None
        self._factor = 1
        # DeepSpeed's optimizer needs a parameter on every rank, and a frozen backbone leaves none on this one
        self.idle: nn.Parameter | None = None
        if not any(parameter.requires_grad for parameter in model.parameters()):
            weight = next(model.parameters())
            self.idle = nn.Parameter(torch.zeros(1, dtype=weight.dtype, device=weight.device))

    def feed(self, micro: Sequence[Batch], scales: Tensor | None) -> None:
        """Sets the micro-batches of the next forward passes. scales: None for evaluation."""
        self._micro, self._scales, self._factor = iter(micro), scales, len(micro)
        device = micro[0].tokens_BS.device
        shape = (SUMS, 1 + self.model.depth) if scales is None else (self.model.loss_count,)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def forward(self, received: Tensor) -> Tensor:
        """Maps the previous stage's output (see `RecycleGPT.run_stage`; on the first stage a placeholder) to this stage's, or
        on the last stage to the loss: in training a scalar, in evaluation the sums by depth [K+1]."""
        batch, mesh = next(self._micro), self.model.mesh
        states = None if mesh.first_stage else received
        if not mesh.last_stage:
            return self.model.run_stage(batch, states)
        if self._scales is None:
            found = self.model.evaluate(batch, states)
            self.sums += found.stacked()
            return found.loss
        total, sums = self.model.train_losses(batch, self._scales, states)
        self.sums += sums
        return total * self._factor  # DeepSpeed divides by the number of micro-batches


class RecyclePipeline(PipelineModule):
    """DeepSpeed's module of the pipeline; the last stage's copy of the embedding is tied to the first stage's weight."""

    def __init__(self, model: RecycleGPT) -> None:
        mesh = model.mesh
        topology = PipeModelDataParallelTopology(mesh.pipeline.size, mesh.tensor.size, mesh.data.size)
        super().__init__([Stage(model)] * mesh.pipeline.size, topology=topology, partition_method="uniform")
        self._tied_group = _tied_group(mesh)
        ends = mesh.first_stage or mesh.last_stage
        # a list, so that the weight is not registered a second time under another name
        self._tied: list[nn.Parameter] = []
        frozen = model.recycle_config.gradient == "frozen_backbone"
        if ends and not frozen and (model.config.tied_embeddings or model.recycle_layers):
            assert model.embedding is not None
            self._tied.append(model.embedding.weight)

    @property
    def stage(self) -> Stage:
        """This rank's stage."""
        stage = self.forward_funcs[0]
        assert isinstance(stage, Stage)
        return stage

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """The embedding with its process group; both ends take part even if one of them has no gradient (detached)."""
        for weight in self._tied:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return [(weight, self._tied_group) for weight in self._tied]


def idle_group(module: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's only group on a stage with nothing to train: see `Stage.idle`."""
    members = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [{"params": members, "weight_decay": 0.0, "part": RECYCLE}]


class _GradientSchedule(TrainSchedule):
    """1F1B without the optimizer step: ranks first agree on whether to apply it."""

    def steps(self) -> Iterator[list[Any]]:
        for commands in super().steps():
            yield [command for command in commands if not isinstance(command, OptimizerStep)]


class _ForwardSchedule(InferenceSchedule):
    """With a frozen backbone: a backward pass on the last stage only, after each of its forward passes."""

    def steps(self) -> Iterator[list[Any]]:
        for commands in super().steps():
            backward = [BackwardPass(one.buffer_id) for one in commands if isinstance(one, ForwardPass)]
            yield [*commands, *(backward if self.is_last_stage else ())]
        yield [ReduceGrads()]


class PipelinePasses:
    """Passes through DeepSpeed's PipelineEngine (see `Passes`).

    Raises TrainingError if the installed DeepSpeed is not the one that this was written for."""

    USES: ClassVar[Uses] = {
        "num_stages": None, "stage_id": None, "total_loss": None, "total_additional_losses": None,
        "set_dataiterator": ("iterator",), "_exec_schedule": ("pipe_schedule",), "_exec_optimizer_step": (),
    }  # fmt: skip
    CALLS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "_exec_reduce_tied_grads": ("get_tied_weights_and_groups",), "_exec_forward_pass": ("_compute_loss",)
    }  # fmt: skip

    def __init__(self, engine: Any) -> None:
        faults = moved(engine, self.USES, self.CALLS)
        if faults:
            raise other_version(faults)
        self._engine = engine
        module = engine.module
        assert isinstance(module, RecyclePipeline)
        self._stage = module.stage
        frozen = module.stage.model.recycle_config.gradient == "frozen_backbone"
        self._schedule = _ForwardSchedule if frozen else _GradientSchedule
        placeholder = torch.zeros(1)
        engine.set_dataiterator(repeat((placeholder, placeholder)))

    def train(self, micro: Sequence[Batch], scales: Tensor) -> Tensor:
        """See `Passes`."""
        engine = self._engine
        self._stage.feed(micro, scales)
        engine.module.train()
        engine.total_loss, engine.total_additional_losses, engine._compute_loss = None, None, True
        engine._exec_schedule(self._schedule(len(micro), engine.num_stages, engine.stage_id))
        return self._stage.sums

    @torch.no_grad()
    def evaluate(self, micro: Sequence[Batch]) -> Tensor:
        """See `Passes`."""
        engine = self._engine
        self._stage.feed(micro, None)
        engine.module.eval()
        engine.total_loss, engine._compute_loss = None, False
        engine._exec_schedule(InferenceSchedule(len(micro), engine.num_stages, engine.stage_id))
        engine.module.train()
        return self._stage.sums

    def take_step(self) -> None:
        """See `Passes`."""
        self._engine._exec_optimizer_step()


def _tied_group(mesh: Mesh) -> Any:
    """The process group of this pipeline's first and last rank. Collective: every rank creates all groups in the same order."""
    layout = Layout(mesh.tensor.size, mesh.pipeline.size, mesh.data.size)
    per_stage = layout.world_size // layout.pipeline
    own = None
    for first in range(per_stage):
        last = first + per_stage * (layout.pipeline - 1)
        group = torch.distributed.new_group([first, last])
        if mesh.rank in (first, last):
            own = group
    return own
