"""Forward and backward passes over a step's micro-batches: each rank runs the whole depth of the model, or one stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from recycle_ds.data.loader import Batch
from recycle_ds.model.recyclegpt import EvaluationSums, RecycleGPT


class Passes(Protocol):
    """What the loop asks of an engine. Every method is collective over the ranks of one replica."""

    def train(self, micro: Sequence[Batch], scales: Tensor) -> Tensor:
        """Accumulates the gradients of all micro-batches and reduces them over the replicas.

        scales: [K+1], the weight of one target's loss. Returns the sums of cross entropy [K+1] float64 over this rank's
        micro-batches; zero on ranks that compute no loss.
        """

    def evaluate(self, micro: Sequence[Batch]) -> Tensor:
        """[4, K+1] float64: loss, count, agreed and judged (`EvaluationSums`), summed; zero on ranks that compute no loss."""

    def take_step(self) -> None:
        """DeepSpeed's optimizer step."""


class WholePasses:
    """Each rank runs the whole depth of the model."""

    def __init__(self, engine: Any, model: RecycleGPT) -> None:
        self._engine, self._losses = engine, 1 + model.depth

    def train(self, micro: Sequence[Batch], scales: Tensor) -> Tensor:
        """See `Passes`."""
        sums = torch.zeros(self._losses, dtype=torch.float64, device=scales.device)
        for index, batch in enumerate(micro):
            self._engine.set_gradient_accumulation_boundary(index == len(micro) - 1)
            total, partial = self._engine(batch, scales)
            # not the model's own output: a hook on that would divide by the accumulation steps at stage 0 all the same
            self._engine.backward(total * 1.0, scale_wrt_gas=False)
            sums += partial
        return sums

    @torch.no_grad()
    def evaluate(self, micro: Sequence[Batch]) -> Tensor:
        """See `Passes`."""
        return torch.stack([stack_sums(self._engine.module(batch, None)) for batch in micro]).sum(0)

    def take_step(self) -> None:
        """See `Passes`."""
        self._engine.step()


def stack_sums(sums: EvaluationSums) -> Tensor:
    """[4, K+1] float64."""
    return torch.stack((sums.loss, sums.count, sums.agreed, sums.judged)).double()
