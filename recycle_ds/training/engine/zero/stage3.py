"""ZeRO 3: each replica has a slice of every weight, gradient, master and moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch import Tensor, nn

from recycle_ds.parallel.mesh import Mesh, ModelParallelUnit
from recycle_ds.parallel.partitions import partition_range, partition_size
from recycle_ds.training.engine.zero.adapter import Kind, Norms, Uses, Weights, norms_of
from recycle_ds.training.engine.zero.inside_step import DecidedInside
from recycle_ds.training.engine.zero.internals import read_fp32


class PartitionedWeights(Weights):
    """Partitioned over the replicas as they are created, so that no rank ever holds the full model."""

    rounded_by_deepspeed = True

    def creating(self, deepspeed_config: dict[str, Any]) -> AbstractContextManager[Any]:
        """See `Weights`."""
        # with `mpu` alone it would partition over all ranks, tensor ranks included
        return deepspeed.zero.Init(
            data_parallel_group=self._mesh.replicas.group,
            mpu=ModelParallelUnit(self._mesh),
            config_dict_or_path=deepspeed_config,
            mem_efficient_linear=False,
        )

    def register(self, model: nn.Module, shared: Callable[[], Tensor]) -> None:
        """See `Weights`. ZeRO-3 must gather the weight for the root module too."""
        deepspeed.zero.register_external_parameter(model, shared())

    def stored(self, parameter: nn.Parameter) -> Tensor:
        """See `Weights`. The parameter's own data is empty or, for a small weight, gathered."""
        return parameter.ds_tensor  # type: ignore[attr-defined]

    def read(self, parameter: nn.Parameter) -> Tensor:
        """See `Weights`."""
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """See `Weights`."""
        self.stored(parameter).copy_(_partition(value, self._mesh))


class Stage3(DecidedInside):
    """Stage 3: each replica has a slice of every weight, gradient, master and moment; the groups are empty between steps."""

    USES: ClassVar[Uses] = {
        "fp16_groups": None, "averaged_gradients": None, "sub_group_to_group_id": None, "persistent_parameters": None,
        "fp32_partitioned_groups_flat": None, "grad_partitions_flat_buffer": None, "ipg_buckets": None,
        "_get_norm_groups": (), "_partition_all_parameters": (),
        "_reassign_or_swap_out_partitioned_parameters": ("sub_group_id",),
    }  # fmt: skip
    USES_OF_PARAMETER: ClassVar[Uses] = {"ds_tensor": None, "ds_shape": None}
    CALLS: ClassVar[Mapping[str, tuple[str, ...]]] = {"step": ("_get_norm_groups",)}
    keeps_gradients = False

    def replace_norm(self, decide: Callable[[], float]) -> None:
        """See `ZeroAdapter`."""
        super().replace_norm(decide)
        self._zero._get_norm_groups = lambda: [self._norm_for_deepspeed()]

    def norms(self, counted: AbstractSet[nn.Parameter]) -> list[Norms]:
        """See `ZeroAdapter`."""
        part_of = self._zero.sub_group_to_group_id
        return [
            (self.groups[part_of[index]]["part"], self._norms_in_group(index, members, counted))
            for index, members in enumerate(self._zero.fp16_groups)
        ]

    def _norms_in_group(
        self, index: int, members: list[nn.Parameter], counted: AbstractSet[nn.Parameter]
    ) -> list[Tensor]:
        return norms_of(zip(members, self._zero.averaged_gradients[index], strict=True), counted)

    def masters(self) -> list[Tensor]:
        """See `ZeroAdapter`."""
        return self._zero.fp32_partitioned_groups_flat

    def buffers(self) -> list[Tensor]:
        """See `ZeroAdapter`. Its partition of the gradients, and buckets for their reduction."""
        found = [self._zero.grad_partitions_flat_buffer, *(one.buffer for one in self._zero.ipg_buckets.values())]
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def read(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        """See `ZeroAdapter`."""
        return read_fp32(parameter, kind)

    def write(self, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
        """See `ZeroAdapter`."""
        part = _partition(value.float(), self._mesh)
        if kind == "weight":
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def refresh(self) -> None:
        """See `ZeroAdapter`."""
        zero = self._zero
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


class Stage3Offloaded(Stage3):
    """Stage 3 with masters, moments and gradients in host memory."""

    USES: ClassVar[Uses] = {**Stage3.USES, "norm_for_param_grads": None, "get_param_id": ("param",)}

    def _norms_in_group(
        self, index: int, members: list[nn.Parameter], counted: AbstractSet[nn.Parameter]
    ) -> list[Tensor]:
        return self._norms_on_host(members, counted)


def _partition(value: Tensor, mesh: Mesh) -> Tensor:
    """This replica's partition of the flattened value, zero-padded."""
    replicas = mesh.replicas
    own = partition_range(value.numel(), replicas.size, replicas.rank)
    part = value.flatten()[own.start : own.stop]
    return nn.functional.pad(part, (0, partition_size(value.numel(), replicas.size) - len(own)))
