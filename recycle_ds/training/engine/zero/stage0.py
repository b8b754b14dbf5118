"""ZeRO 0: every replica has all gradients, masters and moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import ClassVar

import torch
from deepspeed.runtime.fp16 import unfused_optimizer
from torch import Tensor, nn

from recycle_ds.training.engine.zero.adapter import Kind, Norms, Uses, ZeroAdapter, norms_of
from recycle_ds.training.engine.zero.internals import without_norms


class Stage0(ZeroAdapter):
    """Stage 0 in fp32: each replica has all gradients, and parameters are their own masters."""

    reads_are_live = True

    def norms(self, counted: AbstractSet[nn.Parameter]) -> list[Norms]:
        """See `ZeroAdapter`."""
        if self._mesh.replicas.rank:
            return []
        members = zip(self.groups, self._parameters(), strict=True)
        return [(group["part"], norms_of(((p, p.grad) for p in own), counted)) for group, own in members]

    def read(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        """See `ZeroAdapter`."""
        master = self._master(parameter)
        return master.data if kind == "weight" else self._optimizer.state[master][kind]

    def write(self, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
        """See `ZeroAdapter`."""
        self.read(parameter, kind).copy_(value)

    def refresh(self) -> None:
        """See `ZeroAdapter`."""

    def _parameters(self) -> list[list[nn.Parameter]]:
        """The model's parameters, by group."""
        return [group["params"] for group in self.groups]

    def _master(self, parameter: nn.Parameter) -> Tensor:
        return parameter


class Stage0Bf16(Stage0):
    """Stage 0 in bf16: the optimizer's groups have fp32 copies of the parameters."""

    USES: ClassVar[Uses] = {"fp16_groups": None, "fp32_groups": None, "overflow_checker": None}
    CALLS: ClassVar[Mapping[str, tuple[str, ...]]] = {"step": ("overflow_checker", "check", "get_weight_norm")}

    def replace_norm(self, decide: Callable[[], float]) -> None:
        """See `ZeroAdapter`."""
        super().replace_norm(decide)
        self._zero.overflow_checker.check = lambda *_: False  # it reads every gradient; the hold flag does the same

    def step(self, take_step: Callable[[], None]) -> None:
        """See `ZeroAdapter`."""
        with without_norms(unfused_optimizer, "get_weight_norm"):
            super().step(take_step)

    def refresh(self) -> None:
        """See `ZeroAdapter`."""
        for low, high in zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True):
            torch._foreach_copy_(low, high)

    def _parameters(self) -> list[list[nn.Parameter]]:
        return self._zero.fp16_groups

    def _master(self, parameter: nn.Parameter) -> Tensor:
        for low, high in zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True):
            for candidate, master in zip(low, high, strict=True):
                if candidate is parameter:
                    return master
        raise AssertionError("the parameter is in none of the optimizer's groups")
