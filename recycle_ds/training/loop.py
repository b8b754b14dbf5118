"""The training loop: it sequences; schedules, clipping, metrics, checkpoints and signals live beside it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.config import RunConfig
from recycle_ds.data.loader import BatchLoader
from recycle_ds.model.flops import training_flops_per_token
from recycle_ds.parallel.device import peak_flops, peak_memory_gib, synchronise
from recycle_ds.training.batches import StepBatches, assemble
from recycle_ds.training.console import RunConsole, describe_evaluation
from recycle_ds.training.dry_run import dry_run
from recycle_ds.training.engine import TrainingEngine
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.evaluation import evaluate
from recycle_ds.training.gradients import GradientReport
from recycle_ds.training.metrics import MetricsLog
from recycle_ds.training.profiling import StepProfiler
from recycle_ds.training.schedule import learning_rate, loss_weights
from recycle_ds.training.signals import STOP_SIGNALS, StopRequest
from recycle_ds.training.state import Checkpointer, TrainingState


@dataclass(frozen=True)
class StepResult:
    """One optimizer step as all ranks see it."""

    losses: list[float]
    total: float
    gradients: GradientReport
    stop: str
    writing: bool
    """Whether some rank still writes the checkpoint that was begun."""


@dataclass(frozen=True)
class Saving:
    """A checkpoint that is being written."""

    step: int
    begun: float
    waited: float
    """Seconds that training stood still for it so far."""


class Trainer:
    """Runs a built engine from a state to the end of its schedule, to `stop_at`, or to an agreed stop request."""

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        loader: BatchLoader,
        validation: BatchLoader | None,
        checkpointer: Checkpointer,
        metrics: MetricsLog | None,
        device: torch.device,
    ) -> None:
        self.config, self.engine, self.loader, self.validation = config, engine, loader, validation
        self.checkpointer, self.metrics, self.device = checkpointer, metrics, device
        self.state = TrainingState()
        self._seconds, self._steps_timed = 0.0, 0
        training = config.training
        self._flops = training_flops_per_token(config.model, config.recycle, training.seq_length)
        self._peak = peak_flops(training.dtype, device) * engine.mesh.world_size
        self._saved_step = -1
        self._saving: Saving | None = None
        self._skipped_in_a_row = 0
        self._console = RunConsole(first=False, steps=training.steps, begun=0)

    def run(self, state: TrainingState, stop: StopRequest) -> str:
        """Trains from `state` on. Returns why it ended: "finished", "stop_at" or the signal's name, on all ranks
        alike. Raises TrainingError on a step that is not finite, and when the last checkpoint cannot be written."""
        training = self.config.training
        self.state = state
        self._saved_step = state.step
        last = min(training.steps, training.stop_at or training.steps)
        if state.step > last:
            raise TrainingError(
                f"the run in {self.config.run_dir} is at step {state.step}, beyond training.steps ({training.steps}) or "
                f"training.stop_at ({training.stop_at}); raise them, or use another run_dir"
            )
        self._console = RunConsole(first=self.engine.mesh.is_first, steps=training.steps, begun=state.step)
        profiler = StepProfiler(training.profile, Path(self.config.run_dir), self.engine.mesh.rank)
        ended = "finished" if last == training.steps else "stop_at"
        try:
            if training.dry_run and state.step < last:
                self._dry_run()
            while self.state.step < last:
                profiler.before(self.state.step + 1)
                result = self._step(stop)
                profiler.after(self.state.step)
                self._after_step(result, last)
                if result.stop and self.state.step < last:
                    ended = result.stop
                    break
            if not self._save_now():
                raise TrainingError(
                    f"step {self.state.step}: the last checkpoint could not be written to {self.config.run_dir}/checkpoints; "
                    f"free space there and start again: the run goes on from step {max(self._saved_step, 0)}"
                )
        finally:
            profiler.close()
            self._console.close()
        self._console.say(f"{ended} at step {self.state.step}")
        return ended

    def _draw(self) -> StepBatches:
        losses = 1 + self.engine.model.depth
        return assemble(self.loader.step(self.state.next_sample), losses, self.engine.mesh, self.device)

    def _dry_run(self) -> None:
        weights = loss_weights(self.config.training.steps, self.config.recycle)
        batches = self._draw()
        dry_run(self.engine, batches, batches.scales(weights, self.engine.mesh.replicas.size))

    def _step(self, stop: StopRequest) -> StepResult:
        """One optimizer step: draw, forward and backward by micro-batch, agree, update."""
        begun = time.perf_counter()
        step = self.state.step + 1
        batches = self._draw()
        weights = loss_weights(step, self.config.recycle)
        sums = self.engine.passes.train(batches.micro, batches.scales(weights, self.engine.mesh.replicas.size))
        shared, stopping, writing = self._agree(sums, stop.reason)
        losses = batches.means(shared)
        total_loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.training)
        finite = math.isfinite(sum(losses))
        report = self.engine.gradients.step(skip=not finite)
        self._judge(report, total_loss, step)
        self.state = replace(
            self.state,
            step=step,
            next_sample=self.state.next_sample + self.config.training.global_batch_size,
            skipped=self.state.skipped + (not report.applied),
        )
        self._seconds += time.perf_counter() - begun
        self._steps_timed += 1
        return StepResult(losses, total_loss, report, stopping, writing)

    def _agree(self, sums: Tensor, reason: str | None) -> tuple[list[float], str, bool]:
        """Sums of the global batch, the signal any rank was sent ("" for none) and whether any still writes a checkpoint: one
        collective over all ranks.

        Host synchronisation, one of two in a step (the other reads the gradient norms): ranks must agree before the update.
        """
        mesh = self.engine.mesh
        said = [*(reason == name for name in STOP_SIGNALS), not self.checkpointer.ended()]
        votes = torch.tensor(said, dtype=torch.float64, device=self.device)
        # every tensor rank of the last stage has the same sums: one of them counts
        counts = mesh.last_stage and mesh.tensor.rank == 0
        shared = torch.cat((sums if counts else torch.zeros_like(sums), votes))
        if mesh.world_size > 1:
            dist.all_reduce(shared)
        *totals, interrupt, terminate, writing = shared.tolist()
        return totals, STOP_SIGNALS[1] if terminate else STOP_SIGNALS[0] if interrupt else "", bool(writing)

    def _judge(self, report: GradientReport, loss: float, step: int) -> None:
        """Ends the run on all ranks alike where a step that was not applied is one too many; saves what came before it."""
        training = self.config.training
        self._skipped_in_a_row = 0 if report.applied else self._skipped_in_a_row + 1
        allowed = 0 if training.nonfinite == "stop" else training.max_skipped_in_a_row
        if self._skipped_in_a_row <= allowed:
            return
        self._event("nonfinite", f"step {step}: loss {loss}, gradient norm {report.norm}", step)
        kept = f"{self.config.run_dir}/checkpoints"
        if self._save_now():
            kept += f" holds step {self.state.step}"
        many = f" ({self._skipped_in_a_row} steps in a row)" if self._skipped_in_a_row > 1 else ""
        raise TrainingError(
            f"step {step}: loss {loss} with gradient norm {report.norm} is not finite{many}; no weight was changed, {kept}. "
            "Lower training.learning_rate, or set training.nonfinite=skip to pass over such steps"
        )

    def _after_step(self, result: StepResult, last: int) -> None:
        """Log, save and evaluate when they are due; a stop request does not wait for an evaluation."""
        training, step = self.config.training, self.state.step
        self._console.step(step)
        if not result.gradients.applied:
            self._event("skipped_step", f"step {step} skipped: loss or gradient norm is not finite", step)
        if step % training.log_every == 0 or step in (1, last):
            self._log(result)
        if self._saving is not None and not result.writing:
            self._finish_save()
        if training.save_every and step % training.save_every == 0:
            self._begin_save()
        due = training.eval_every and (step % training.eval_every == 0 or step == last)
        if self.validation is not None and due and not result.stop:
            self._evaluate()

    def _log(self, result: StepResult) -> None:
        training = self.config.training
        tokens_a_step = training.global_batch_size * training.seq_length
        begun = time.perf_counter()
        synchronise(self.device)  # host synchronisation, on logging steps only: the queued work belongs to these steps
        self._seconds += time.perf_counter() - begun
        rate = tokens_a_step * self._steps_timed / max(self._seconds, 1e-9)
        self._seconds, self._steps_timed = 0.0, 0
        record: dict[str, Any] = {
            "step": self.state.step,
            "loss": result.total,
            "backbone_loss": result.losses[0],
            "recycle_loss": result.losses[1:],
            "grad_norm": result.gradients.norm,
            "learning_rate": learning_rate(self.state.step, training),
            "tokens": self.state.step * tokens_a_step,
            "tokens_per_second": rate,
            "mfu": rate * self._flops / self._peak,
            "memory_gib": peak_memory_gib(self.device),
            "time": time.time(),
        }
        recycle = self.config.recycle
        if recycle.layers and recycle.gradient != "frozen_backbone":
            record["grad_norm_by_part"] = result.gradients.by_part
        if self.metrics is not None:
            self.metrics.write(record)
            self._console.metrics(record)

    def _evaluate(self) -> None:
        assert self.validation is not None
        # about one pass over the files at most
        available = sum(self.validation.dataset.samples_per_epoch) // self.validation.global_batch_size
        batches = min(self.config.training.eval_batches, max(1, available))
        result = evaluate(self.engine, self.validation, batches, self.device)
        record = {
            "step": self.state.step,
            "eval_loss": result.loss,
            "eval_recycle_loss": result.recycle_loss,
            "eval_acceptance": result.acceptance,
        }
        if self.metrics is not None:
            self.metrics.write(record)
            self._console.say(describe_evaluation(record))

    def _save_now(self) -> bool:
        """Has the present state on disk when it returns. False where the disk refused it."""
        if self._saving is not None:
            self._finish_save()
        if self._saved_step == self.state.step:
            return True
        self._begin_save()
        return self._saving is not None and self._finish_save()

    def _begin_save(self) -> None:
        """Copies the state and lets a thread write it; waits for the one before, if that is not done."""
        if self._saving is not None:
            self._finish_save()
        begun = time.perf_counter()
        if self.checkpointer.begin(self.state):
            self._saving = Saving(self.state.step, begun, time.perf_counter() - begun)
        else:
            self._save_failed(self.state.step)

    def _finish_save(self) -> bool:
        """Publishes what was begun, waiting for it if need be. False where the disk refused it: the run goes on."""
        assert self._saving is not None, "a save was begun"
        saving, self._saving = self._saving, None
        asked = time.perf_counter()
        folder = self.checkpointer.finish()
        if folder is None:
            self._save_failed(saving.step)
            return False
        self._saved_step = saving.step
        now = time.perf_counter()
        waited = saving.waited + now - asked
        self._console.say(f"saved {folder} in {now - saving.begun:.1f} s; training waited {waited:.2f} s")
        return True

    def _save_failed(self, step: int) -> None:
        self._event("save_failed", f"step {step}: the checkpoint could not be written; older ones are whole", step)

    def _event(self, event: str, text: str, step: int) -> None:
        if self.metrics is not None:
            self.metrics.write({"event": event, "step": step, "time": time.time()})
        self._console.say(f"warning: {text}")
