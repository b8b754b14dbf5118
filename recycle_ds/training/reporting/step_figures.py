"""The figures of a logged step: losses, norms, learning rate, throughput, memory."""

from __future__ import annotations

import time
from typing import Any

from recycle_ds.config import RunConfig
from recycle_ds.model.flops import training_flops_per_token
from recycle_ds.parallel.device import peak_flops, peak_memory_gib, synchronise
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.observers import Observer, StepEnd


class StepFigures(Observer):
    """Measures the time of the steps between two logged ones."""

    every_rank = True  # each waits for its own device
    on_error = "raise"

    def __init__(self, config: RunConfig, mesh: Mesh, depth: int) -> None:
        """depth: unrolled steps of the recycle module."""
        self._config, self._depth, self._device = config, depth, mesh.device
        self._seconds, self._steps = 0.0, 0
        training = config.training
        self._flops = training_flops_per_token(config.model, config.recycle, training.seq_length)
        arithmetic = "tf32" if training.tf32 and mesh.device.type == "cuda" else training.dtype
        self._peak = peak_flops(arithmetic, mesh.device) * mesh.world_size

    def after_step(self, end: StepEnd) -> None:
        """Counts the step and its time, also if it is repeated."""
        self._seconds += end.seconds
        self._steps += 1

    def figures(self, end: StepEnd) -> dict[str, Any]:
        """`loss` is the weighted total that is optimised, `backbone_loss` the backbone's."""
        training, recycle = self._config.training, self._config.recycle
        tokens_a_step = training.global_batch_size * training.seq_length
        start = time.perf_counter()
        synchronise(self._device)  # host synchronisation, on logging steps only: the queued work belongs to these steps
        self._seconds += time.perf_counter() - start
        rate = tokens_a_step * self._steps / max(self._seconds, 1e-9)
        self._seconds, self._steps = 0.0, 0
        line: dict[str, Any] = {
            "step": end.step,
            "loss": end.loss,
            "backbone_loss": end.losses[0],
            "recycle_loss": list(end.losses[1 : 1 + self._depth]),
            "grad_norm": end.grad_norm,
            "learning_rate": end.learning_rate,
            "tokens": end.step * tokens_a_step,
            "tokens_per_second": rate,
            "mfu": rate * self._flops / self._peak,
            "memory_gib": peak_memory_gib(self._device),
            "time": time.time(),
        }
        if recycle.confidence:
            line["confidence_loss"] = list(end.losses[1 + self._depth :])
        if recycle.layers and recycle.gradient != "frozen_backbone":
            line["grad_norm_by_part"] = dict(end.grad_norm_by_part)
        return line
