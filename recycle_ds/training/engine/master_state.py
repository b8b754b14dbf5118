"""fp32 master weights and Adam moments of one engine, one unpartitioned parameter at a time, at every ZeRO stage.

`read` and `refresh` are collective over the replicas, so all ranks must call them in the same order; `write` is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recycle_ds.parallel.partitions import local_shape
from recycle_ds.training.engine.zero.adapter import KINDS, Kind, ZeroAdapter


def owning_replica(names: list[str], replicas: int) -> dict[str, int]:
    """The replica that saves each parameter, assigned round-robin so that no rank saves all of them."""
    return {name: number % replicas for number, name in enumerate(sorted(names))}


def fp32_copy(value: Tensor) -> Tensor | None:
    """A frozen weight in fp32 on the host, for checkpoints; None if bf16 holds its exact value, as of a model saved in bf16."""
    exact = value.to("cpu", torch.float32, copy=True)
    return None if torch.equal(exact.to(torch.bfloat16).float(), exact) else exact


class MasterState:
    """Reads and writes master weights and moments. Values are this rank's tensor shard, not partitioned by ZeRO."""

    def __init__(self, zero: ZeroAdapter, model: nn.Module, frozen: dict[str, Tensor | None] | None = None) -> None:
        """frozen: fp32 copies, on the host, of the frozen weights that this replica saves, see `fp32_copy`; None unless
        training in bf16."""
        self._zero, self._frozen = zero, frozen
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())

    def kinds(self, name: str) -> tuple[Kind, ...]:
        """The tensors that a parameter has: a frozen one has a weight only."""
        return KINDS if self.parameters[name].requires_grad else KINDS[:1]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the unpartitioned local parameter."""
        return local_shape(self.parameters[name])

    @torch.no_grad()
    def read(self, name: str, kind: Kind) -> Tensor:
        """The unpartitioned local master weight or moment, fp32; undefined for a frozen one that another replica saves."""
        parameter = self.parameters[name]
        if parameter.requires_grad:
            return self._zero.read(parameter, kind).view(self.shape(name))
        value = self._zero.weights.read(parameter)  # may be collective: on replicas with a copy too
        if self._frozen is None or name not in self._frozen:  # another replica saves it
            return value
        copy = self._frozen[name]
        return value.float() if copy is None else copy

    @torch.no_grad()
    def write(self, name: str, kind: Kind, value: Tensor) -> None:
        """Replaces an unpartitioned local master weight or moment; call `refresh` after the last one. Not collective."""
        parameter = self.parameters[name]
        if parameter.requires_grad:
            self._zero.write(parameter, kind, value)
            return
        if self._frozen is not None and name in self._frozen:
            self._frozen[name] = fp32_copy(value)
        self._zero.weights.write(parameter, value)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master weights to the weights that the model computes with. Collective over the replicas."""
        self._zero.refresh()
