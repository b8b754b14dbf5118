"""ZeRO 1 and 2: each replica has a partition of masters and moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn

from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.engine.optimizer import AdamW
from recycle_ds.training.engine.zero.adapter import Kind, Norms, Uses, Weights, ZeroAdapter, norms_of
from recycle_ds.training.engine.zero.inside_step import DecidedInside
from recycle_ds.training.engine.zero.internals import read_fp32, without_norms


class Linked(ZeroAdapter):
    """DeepSpeed links each parameter with its fragments of flat fp32 masters and moments."""

    USES: ClassVar[Uses] = {"_lazy_init_hp_params_optimizer_state": (), "update_lp_params": ()}
    USES_OF_PARAMETER: ClassVar[Uses] = {"_hp_mapping": None}

    def allocate_moments(self) -> None:
        """See `ZeroAdapter`. DeepSpeed would link moments to parameters after the first group's step, when the other groups
        have none yet, and would never link those."""
        super().allocate_moments()
        self._zero._lazy_init_hp_params_optimizer_state()

    def read(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        """See `ZeroAdapter`."""
        return read_fp32(parameter, kind)

    def write(self, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
        """See `ZeroAdapter`."""
        value = value.to(parameter.device, torch.float32)
        if kind == "weight":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def refresh(self) -> None:
        """See `ZeroAdapter`."""
        self._zero.update_lp_params()


class Stage1Fp32Accumulation(Linked):
    """Stage 1 in bf16 with fp32 accumulation: each replica has all gradients in fp32, and partitions of masters and moments."""

    USES: ClassVar[Uses] = {
        **Linked.USES, "bf16_groups": None, "fp32_groups_gradients": None, "get_grads_for_norm": ("for_clipping",)
    }  # fmt: skip
    CALLS: ClassVar[Mapping[str, tuple[str, ...]]] = {"step": ("get_grads_for_norm", "get_global_norm_of_tensors")}

    def replace_norm(self, decide: Callable[[], float]) -> None:
        """See `ZeroAdapter`."""
        super().replace_norm(decide)
        self._zero.get_grads_for_norm = lambda for_clipping=False: ([], {})

    def step(self, take_step: Callable[[], None]) -> None:
        """See `ZeroAdapter`."""
        with without_norms(bf16_optimizer, "get_global_norm_of_tensors"):  # over tensor ranks
            super().step(take_step)

    def norms(self, counted: AbstractSet[nn.Parameter]) -> list[Norms]:
        """See `ZeroAdapter`."""
        if self._mesh.replicas.rank:
            return []
        groups = zip(self.groups, self._zero.bf16_groups, self._zero.fp32_groups_gradients, strict=True)
        return [(group["part"], norms_of(zip(low, high, strict=True), counted)) for group, low, high in groups]

    def prepare_pipeline(self) -> None:
        """See `ZeroAdapter`. PipelineEngine reads tied gradients from _hp_grad, which is set only after the first gradient."""
        for low, high in zip(self._zero.bf16_groups, self._zero.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(low, high, strict=True):
                parameter._hp_grad = gradient


class Stages12(Linked, DecidedInside):
    """Stages 1 and 2: each replica has a partition of masters and moments, and the averaged gradients of it."""

    USES: ClassVar[Uses] = {
        **Linked.USES, "params_in_partition": None, "averaged_gradients": None, "partition_gradients": None,
        "scaled_global_norm": ("norm_type",),
    }  # fmt: skip
    CALLS: ClassVar[Mapping[str, tuple[str, ...]]] = {"step": ("scaled_global_norm",)}

    def __init__(self, zero: Any, optimizer: AdamW, mesh: Mesh, weights: Weights) -> None:
        super().__init__(zero, optimizer, mesh, weights)
        self.keeps_gradients = not zero.partition_gradients

    def replace_norm(self, decide: Callable[[], float]) -> None:
        """See `ZeroAdapter`."""
        super().replace_norm(decide)
        self._zero.scaled_global_norm = lambda *_: self._norm_for_deepspeed()

    def norms(self, counted: AbstractSet[nn.Parameter]) -> list[Norms]:
        """See `ZeroAdapter`."""
        members = enumerate(zip(self.groups, self._zero.params_in_partition, strict=True))
        return [(group["part"], self._norms_in_group(index, own, counted)) for index, (group, own) in members]

    def _norms_in_group(
        self, index: int, members: list[nn.Parameter], counted: AbstractSet[nn.Parameter]
    ) -> list[Tensor]:
        gradients = [g for g in self._zero.averaged_gradients[index] if not getattr(g, "_zero_padding", False)]
        # the last partitions are zero-padded if the group does not divide evenly; not all paths mark the padding
        assert len(members) <= len(gradients) <= len(members) + 1, "padding must be at the end of a partition"
        return norms_of(zip(members, gradients, strict=False), counted)


class Stages12Offloaded(Stages12):
    """Stages 1 and 2 with masters, moments and gradients in host memory."""

    USES: ClassVar[Uses] = {**Stages12.USES, "norm_for_param_grads": None, "get_param_id": ("param",)}

    def _norms_in_group(
        self, index: int, members: list[nn.Parameter], counted: AbstractSet[nn.Parameter]
    ) -> list[Tensor]:
        return self._norms_on_host(members, counted)
