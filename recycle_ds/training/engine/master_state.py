"""fp32 master weights and Adam moments of one engine, one unpartitioned parameter at a time, at every ZeRO stage.

`read` and `refresh` are collective over the replicas, so all ranks must call them in the same order; `write` is not.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recycle_ds.parallel.partitions import partition_range, partition_size
from recycle_ds.training.engine.optimizer import AdamW

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")


def owning_replica(names: list[str], replicas: int) -> dict[str, int]:
    """The replica that saves each parameter, assigned round-robin so that no rank saves all of them."""
    return {name: number % replicas for number, name in enumerate(sorted(names))}


def fp32_copy(value: Tensor) -> Tensor | None:
    """A frozen weight in fp32 on the host, for checkpoints; None if bf16 holds its exact value, as of a model saved in bf16."""
    exact = value.to("cpu", torch.float32, copy=True)
    return None if torch.equal(exact.to(torch.bfloat16).float(), exact) else exact


@torch.no_grad()
def write_partition(parameter: nn.Parameter, value: Tensor, replicas: int, rank: int) -> None:
    """Writes a replica's slice of an unpartitioned local value into a parameter that ZeRO-3 keeps partitioned."""
    partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    partition.copy_(partition_of(value, replicas, rank))


def partition_of(value: Tensor, replicas: int, rank: int) -> Tensor:
    """A replica's partition of the flattened value, zero-padded."""
    own = partition_range(value.numel(), replicas, rank)
    part = value.flatten()[own.start : own.stop]
    return torch.nn.functional.pad(part, (0, partition_size(value.numel(), replicas) - len(own)))


class MasterState:
    """Reads and writes master weights and moments. Values are this rank's tensor shard, not partitioned by ZeRO."""

    def __init__(
        self, engine: Any, model: nn.Module, optimizer: AdamW, frozen: dict[str, Tensor | None] | None = None
    ) -> None:
        """frozen: fp32 copies, on the host, of the frozen weights that this replica saves, see `fp32_copy`; None unless
        training in bf16."""
        self._engine, self._optimizer, self._frozen = engine, optimizer, frozen
        self._zero = engine.optimizer
        self._stage = engine.zero_optimization_stage()
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())

    def kinds(self, name: str) -> tuple[Kind, ...]:
        """The tensors that a parameter has: a frozen one has a weight only."""
        return KINDS if self.parameters[name].requires_grad else KINDS[:1]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the unpartitioned local parameter."""
        parameter = self.parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def allocate_moments(self) -> None:
        """Creates all moments before the first step.

        At stages 1 and 2 DeepSpeed would otherwise link moments to parameters after the first group's step, when the other
        groups have none yet, and would never link those. It also makes an out-of-memory error come at once.
        """
        if self._stage == 3:  # the groups are empty between steps
            self._optimizer.allocate(self._zero.fp32_partitioned_groups_flat)
            return
        self._optimizer.allocate()
        if self._stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def read(self, name: str, kind: Kind) -> Tensor:
        """The unpartitioned local master weight or moment, fp32; undefined for a frozen one that another replica saves."""
        parameter = self.parameters[name]
        if not parameter.requires_grad:
            copies = self._frozen
            # at stage 3 this is collective, whether or not this replica has a copy
            value = self._read_frozen(parameter) if copies is None or self._stage == 3 else parameter.data
            if copies is None or name not in copies:  # another replica saves it
                return value
            copy = copies[name]
            return value.float() if copy is None else copy
        if self._stage == 0:
            return self._plain(parameter, kind)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        value = (
            safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)
        )
        assert value is not None, f"DeepSpeed has no {kind} of {name}"
        return value.view(self.shape(name))

    @torch.no_grad()
    def write(self, name: str, kind: Kind, value: Tensor) -> None:
        """Replaces an unpartitioned local master weight or moment; call `refresh` after the last one. Not collective."""
        parameter = self.parameters[name]
        if not parameter.requires_grad:
            if self._frozen is not None and name in self._frozen:
                self._frozen[name] = fp32_copy(value)
            self._write_frozen(parameter, value)
        elif self._stage == 0:
            self._plain(parameter, kind).copy_(value)
        elif self._stage == 3:
            self._write_partition(parameter, kind, value)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            value = value.to(parameter.device, torch.float32)
            if kind == "weight":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)

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

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master weights to the weights that the model computes with. Collective over the replicas."""
        if self._stage == 0:
            if self._has_copies:
                for low, high in zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True):
                    torch._foreach_copy_(low, high)
        elif self._stage == 3:
            zero = self._zero
            zero._partition_all_parameters()
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        else:
            self._zero.update_lp_params()

    @property
    def _has_copies(self) -> bool:
        return hasattr(self._zero, "fp32_groups")

    def _plain(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        """Stage 0: the parameter is its own master in fp32; in bf16 the optimizer holds an fp32 copy."""
        master: Tensor = parameter
        if self._has_copies:
            for low, high in zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True):
                for index, candidate in enumerate(low):
                    if candidate is parameter:
                        master = high[index]
        return master.data if kind == "weight" else self._optimizer.state[master][kind]

    def _write_partition(self, parameter: nn.Parameter, kind: Kind, value: Tensor) -> None:
        """Stage 3: each rank keeps its slice; the last one is padded if the size does not divide evenly."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        zero: Any = parameter._z3_optimizer  # type: ignore[attr-defined]
        rank = zero._get_param_partition_rank(parameter)
        part = partition_of(value.float(), zero._get_param_partition_world_size(parameter), rank)
        if kind == "weight":
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def _read_frozen(self, parameter: nn.Parameter) -> Tensor:
        if self._stage != 3:
            return parameter.data
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()

    def _write_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Not collective, like every `write`: if one rank cannot read its part, the others must not hang in a collective."""
        if self._stage != 3:
            parameter.data.copy_(value)
            return
        group = parameter.ds_process_group  # type: ignore[attr-defined]
        write_partition(parameter, value, dist.get_world_size(group), dist.get_rank(group))
