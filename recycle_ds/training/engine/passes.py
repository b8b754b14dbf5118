"""Forward and backward passes over a step's micro-batches: each rank runs all layers of the model, or one pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from recycle_ds.data.loader import Batch
from recycle_ds.model.recyclegpt import RecycleGPT


class Passes(Protocol):
    """The passes of an engine, as the training loop calls them. Every method is collective over all ranks."""

    def train(self, micro: Sequence[Batch], scales: Tensor) -> Tensor:
        """Accumulates the gradients of all micro-batches and reduces them over the replicas.

        scales: [K+1], weight of one target's loss by depth. Returns the sums of the model's losses [loss_count] float64 over
        this rank's micro-batches, as `RecycleGPT.train_losses`; zero on ranks that compute no loss.
        """

    def evaluate(self, micro: Sequence[Batch]) -> Tensor:
        """[SUMS, K+1] float64: `EvaluationSums.stacked`, summed; zero on ranks that compute no loss."""

    def take_step(self) -> None:
        """Runs DeepSpeed's optimizer step."""


class FullDepthPasses:
    """Passes without a pipeline: each rank runs all layers of the model."""

    def __init__(self, engine: Any, model: RecycleGPT) -> None:
        self._engine, self._model = engine, model

    def train(self, micro: Sequence[Batch], scales: Tensor) -> Tensor:
        """See `Passes`."""
        sums = torch.zeros(self._model.loss_count, dtype=torch.float64, device=scales.device)
        for index, batch in enumerate(micro):
            self._engine.set_gradient_accumulation_boundary(index == len(micro) - 1)
            total, partial = self._model.train_losses(batch, scales, through=self._engine)
            # `* 1.0`: at stage 0 a hook on the model's own output would divide by the accumulation steps regardless
            self._engine.backward(total * 1.0, scale_wrt_gas=False)
            sums += partial
        return sums

    @torch.no_grad()
    def evaluate(self, micro: Sequence[Batch]) -> Tensor:
        """See `Passes`."""
        return torch.stack([self._model.evaluate(batch).stacked() for batch in micro]).sum(0)

    def take_step(self) -> None:
        """See `Passes`."""
        self._engine.step()
