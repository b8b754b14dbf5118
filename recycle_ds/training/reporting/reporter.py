"""Reports of a run: to the metrics log, the console, the summary and the batch job's shell."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from recycle_ds.config import RunConfig
from recycle_ds.data.loader import BatchLoader
from recycle_ds.model.flops import training_flops_per_token
from recycle_ds.parallel.device import peak_flops, peak_memory_gib, synchronise
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.engine.gradients import GradientReport
from recycle_ds.training.engine.validation import evaluate
from recycle_ds.training.faults.stragglers import WorkTimer, slowest
from recycle_ds.training.reporting.console import RunConsole, describe_evaluation
from recycle_ds.training.reporting.run_logs import RunLogs
from recycle_ds.training.schedule import learning_rate

_NOTICEABLE = 0.1
"""Seconds of a rank's own work in a step below which no rank is reported as slow."""


class Reporter:
    """Every rank has one; only the first one's writes and prints. `log` and `evaluate` are collective."""

    def __init__(self, config: RunConfig, engine: TrainingEngine, logs: RunLogs, device: torch.device) -> None:
        self._config, self._engine, self._logs, self._device = config, engine, logs, device
        self._seconds, self._steps, self._logged = 0.0, 0, False
        training = config.training
        self._flops = training_flops_per_token(config.model, config.recycle, training.seq_length)
        arithmetic = "tf32" if training.tf32 and device.type == "cuda" else training.dtype
        self._peak = peak_flops(arithmetic, device) * engine.mesh.world_size
        # a pipeline, which is never compiled, calls the module and not the engine
        self.work = WorkTimer(engine.engine if engine.mesh.pipeline.size == 1 else engine.model, engine.mesh, device)
        self._console = RunConsole(first=False, steps=training.steps, completed=0)

    def start(self, step: int) -> None:
        """Starts the console at `step`."""
        self._console = RunConsole(first=self._engine.mesh.is_first, steps=self._config.training.steps, completed=step)

    def close(self) -> None:
        """Stops the progress bar."""
        self._console.close()

    def say(self, text: str) -> None:
        """Prints one line."""
        self._console.say(text)

    def event(self, event: str, text: str, step: int, **details: Any) -> None:
        """Records an anomaly in the metrics and the summary, and prints a warning."""
        if self._logs.metrics is not None:
            self._logs.metrics.write({"event": event, "step": step, "time": time.time(), **details})
        if self._logs.sessions is not None:
            self._logs.sessions.event(event)
        self.say(f"warning: {text}")

    def stepped(self, step: int, seconds: float) -> None:
        """Records that a step was run, and how long it took."""
        self._seconds += seconds
        self._steps += 1
        self._console.step(step)
        if self._logs.sessions is not None:
            self._logs.sessions.stepped(step, seconds)

    def saved(self, step: int, waited: float) -> None:
        """Records that a checkpoint was published; training was blocked by it for `waited` seconds."""
        self._logs.job.write_note("progress", str(step))
        if self._logs.sessions is not None:
            self._logs.sessions.saved(waited)

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`: the run was rolled back to it."""
        if self._logs.metrics is not None:
            self._logs.metrics.rewind(step)

    def log(self, step: int, losses: list[float], total: float, gradients: GradientReport) -> None:
        """Writes a line of metrics.jsonl. `loss` is the weighted total that is optimised, `backbone_loss` the backbone's."""
        training = self._config.training
        tokens_a_step = training.global_batch_size * training.seq_length
        start = time.perf_counter()
        synchronise(self._device)  # host synchronisation, on logging steps only: the queued work belongs to these steps
        self._seconds += time.perf_counter() - start
        rate = tokens_a_step * self._steps / max(self._seconds, 1e-9)
        self._seconds, self._steps = 0.0, 0
        record: dict[str, Any] = {
            "step": step,
            "loss": total,
            "backbone_loss": losses[0],
            "recycle_loss": losses[1 : 1 + self._engine.model.depth],
            "grad_norm": gradients.norm,
            "learning_rate": learning_rate(step, training),
            "tokens": step * tokens_a_step,
            "tokens_per_second": rate,
            "mfu": rate * self._flops / self._peak,
            "memory_gib": peak_memory_gib(self._device),
            "time": time.time(),
        }
        recycle = self._config.recycle
        if recycle.confidence:
            record["confidence_loss"] = losses[1 + self._engine.model.depth :]
        if recycle.layers and recycle.gradient != "frozen_backbone":
            record["grad_norm_by_part"] = gradients.by_part
        self._look_for_stragglers(step, record)
        if self._logs.metrics is not None:
            self._logs.metrics.write(record)
            self._console.metrics(record)

    def evaluate(self, step: int, validation: BatchLoader) -> None:
        """Writes a line of metrics.jsonl with validation losses and acceptance; `eval_loss` is the backbone's."""
        # at most about one pass over the files
        available = sum(validation.dataset.samples_per_epoch) // validation.global_batch_size
        batches = min(self._config.training.eval_batches, max(1, available))
        result = evaluate(self._engine, validation, batches, self._device)
        record: dict[str, Any] = {
            "step": step,
            "eval_loss": result.loss,
            "eval_recycle_loss": result.recycle_loss,
            "eval_acceptance": result.acceptance,
        }
        if result.tokens_per_full_call is not None:
            record["eval_tokens_per_full_call"] = result.tokens_per_full_call
        self.work.reset()
        if self._logs.metrics is not None:
            self._logs.metrics.write(record)
            self.say(describe_evaluation(record))

    def _look_for_stragglers(self, step: int, record: dict[str, Any]) -> None:
        """Adds the ranks' own working time to the record, and reports a rank that is far slower than its peers."""
        seconds = self.work.gather()
        rank, most, ratio = slowest(seconds, self._engine.mesh.pipeline.size)
        record["rank_seconds"] = {"median": median(seconds), "slowest": most, "slowest_rank": rank}
        warm, self._logged = self._logged, True  # the first steps are slow on some rank or other
        if not warm or ratio <= self._config.faults.straggler_ratio or most < _NOTICEABLE:
            return
        host = self.work.host_of(rank)
        self.event(
            "straggler",
            f"rank {rank} on {host} needs {most:.2f} s per step for its own work, {ratio:.1f} times the median of its peers",
            step,
            rank=rank,
            host=host,
            ratio=ratio,
        )
