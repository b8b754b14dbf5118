"""What training, checkpoints and reports need of DeepSpeed's optimizer: an interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.engine.optimizer import AdamW

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")
Norms = tuple[str, list[Tensor]]
"""A part of the model, and norms of gradients of this part: scalars."""
Uses = Mapping[str, tuple[str, ...] | None]
"""Names of attributes; with their parameters for methods, None for others."""


class Weights:
    """How a replica stores the model's weights: here unpartitioned, in the parameters."""

    rounded_by_deepspeed = False
    """Whether DeepSpeed rounds weights to bf16 as they are created."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def creating(self, deepspeed_config: dict[str, Any]) -> AbstractContextManager[Any]:
        """The context in which the model's parameters are created."""
        return nullcontext()

    def register(self, model: nn.Module, shared: Callable[[], Tensor]) -> None:
        """Called before DeepSpeed wraps the model. shared: gives a weight that the root module uses, not only its owner; a
        pipeline stage, which is never partitioned, may have none."""

    def stored(self, parameter: nn.Parameter) -> Tensor:
        """The tensor that this rank keeps between steps: the parameter or, of another shape, its partition."""
        return parameter

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The unpartitioned local value as the model computes with it. Collective over the replicas if it is partitioned."""
        return parameter.data

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replaces the value; `value` is unpartitioned. Not collective: a rank that cannot read its value must not leave the
        others in a collective."""
        parameter.data.copy_(value)


class ZeroAdapter(ABC):
    """One of DeepSpeed's optimizers on this rank, around `optimizer`. Values and shapes are unpartitioned local parameters."""

    USES: ClassVar[Uses] = {}
    """What the class relies on in DeepSpeed's optimizer, see `internals`."""
    USES_OF_PARAMETER: ClassVar[Uses] = {}
    """What DeepSpeed must have set on a trainable parameter."""
    CALLS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """A method of DeepSpeed's optimizer that must call others: those that are replaced so that it computes no norm itself."""

    reads_are_live = False
    """Whether `read` returns the tensors that the optimizer updates, and not copies of them."""
    keeps_gradients = True
    """Whether a rank keeps the gradients of all its parameters until the step."""

    def __init__(self, zero: Any, optimizer: AdamW, mesh: Mesh, weights: Weights) -> None:
        self._zero, self._optimizer, self._mesh, self.weights = zero, optimizer, mesh, weights
        # DeepSpeed replaces the optimizer's list of groups during a step: keep the real ones
        self.groups: list[dict[str, Any]] = list(optimizer.param_groups)

    @abstractmethod
    def norms(self, counted: AbstractSet[nn.Parameter]) -> list[Norms]:
        """fp32 norms of the reduced gradients that this rank counts, before clipping: of its partitions, or on replica 0 of all
        its gradients. counted: other parameters are left out. Only valid while `decide` runs."""

    def replace_norm(self, decide: Callable[[], float]) -> None:
        """Replaces DeepSpeed's norm: `step` calls `decide` once the gradients are final and before the update, unless DeepSpeed
        returns earlier. decide: reads `norms`, lets the optimizer clip or hold, and returns a finite norm for DeepSpeed."""
        self._decide = decide

    def step(self, take_step: Callable[[], None]) -> None:
        """Runs DeepSpeed's step with `take_step`. Collective."""
        self._decide()
        take_step()

    def masters(self) -> list[Tensor]:
        """The fp32 tensors that AdamW updates on this rank: partitions, or the parameters themselves."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def buffers(self) -> list[Tensor]:
        """Tensors that DeepSpeed keeps on this rank between steps beside weights, masters and moments."""
        return []

    def allocate_moments(self) -> None:
        """Creates all moments before the first step, so that an out-of-memory error comes at once."""
        self._optimizer.allocate(self.masters())

    @abstractmethod
    def read(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        """The fp32 master weight or a moment of a trainable parameter. Collective over the replicas."""

    @abstractmethod
    def write(self, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
        """Replaces what `read` returns; call `refresh` after the last one. Not collective."""

    @abstractmethod
    def refresh(self) -> None:
        """Copies the master weights to the weights that the model computes with. Collective over the replicas."""

    @property
    def adam_step(self) -> int:
        """Number of updates that Adam's bias correction has counted; skipped steps do not count."""
        steps = {int(state["step"].item()) for state in self._optimizer.state.values() if "step" in state}
        assert len(steps) <= 1, f"parameters disagree on Adam's step: {sorted(steps)}"
        return steps.pop() if steps else 0

    @adam_step.setter
    def adam_step(self, step: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def prepare_pipeline(self) -> None:  # noqa: B027  (most classes need nothing)
        """Called once, if the engine is DeepSpeed's PipelineEngine."""


def norms_of(pairs: Iterable[tuple[nn.Parameter, Tensor | None]], counted: AbstractSet[nn.Parameter]) -> list[Tensor]:
    """fp32 norms of the present gradients of counted parameters, without fp32 copies of those in bf16."""
    kept = [gradient for parameter, gradient in pairs if gradient is not None and parameter in counted]
    return list(torch._foreach_norm(kept, 2, dtype=torch.float32)) if kept else []
