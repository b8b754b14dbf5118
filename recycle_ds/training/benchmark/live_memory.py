"""Counts the bytes of live tensors by unique storage, so that memory figures do not depend on the process's size."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recycle_ds.parallel.partitions import local_shape
from recycle_ds.training.engine.zero.adapter import ZeroAdapter


class PeakMemory(TorchDispatchMode):
    """While entered, tracks storages that operations create; `peak` is the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.current = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf, inputs)
        return result

    def _track(self, tensor: torch.Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in inputs:
            return
        size = storage.nbytes()
        self._live[key] = size
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        if self._live.pop(key, None) is not None:
            self.current -= size


@dataclass(frozen=True)
class PersistentTensors:
    """Tensors that a model in DeepSpeed's engine keeps on this rank between steps."""

    parameters: int
    """Number of weights of the full model, even if ZeRO-3 has partitioned them."""
    state: list[torch.Tensor]
    """Weights, fp32 masters and moments."""
    beside: list[torch.Tensor]
    """Buffers that ZeRO-3 allocates once: its partition of the gradients, and a reduction bucket."""


def persistent_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, zero: ZeroAdapter
) -> PersistentTensors:
    """The persistent tensors at any ZeRO stage. optimizer: torch's. A gathered weight counts with its partition."""
    parameters = list(model.parameters())
    moments = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return PersistentTensors(
        parameters=sum(math.prod(local_shape(parameter)) for parameter in parameters),
        state=[*parameters, *map(zero.weights.stored, parameters), *zero.masters(), *moments],
        beside=zero.buffers(),
    )


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
