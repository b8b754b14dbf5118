"""The training loop: it sequences; schedules, clipping, metrics, checkpoints and signals live beside it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.config import RunConfig
from recycle_ds.data.errors import DataError
from recycle_ds.data.loader import BatchLoader
from recycle_ds.parallel.peers import TakenOver
from recycle_ds.parallel.rendezvous import shorten_timeouts
from recycle_ds.training.batches import StepBatches, assemble
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.engine.dry_run import dry_run
from recycle_ds.training.engine.gradients import GradientReport
from recycle_ds.training.errors import OwnError, TrainingError
from recycle_ds.training.faults.bad_steps import APPLY, RETRY, ROLLBACK, SKIP, STOP, BadSteps
from recycle_ds.training.faults.stop_requests import REASONS, TAKEN_OVER, StopRequest
from recycle_ds.training.faults.watchdog import PATIENCE, Watchdog
from recycle_ds.training.reporting.profiling import StepProfiler
from recycle_ds.training.reporting.reporter import Reporter
from recycle_ds.training.reporting.run_logs import Records
from recycle_ds.training.saving import Saver
from recycle_ds.training.schedule import learning_rate, loss_weights
from recycle_ds.training.state import Checkpointer, TrainingState

_ANSWERS = {
    SKIP: "the step and its data are skipped",
    RETRY: "no weight was changed, the same data are taken once more",
    ROLLBACK: "going back to the newest checkpoint",
    STOP: "the run ends",
}


@dataclass(frozen=True)
class StepResult:
    """One optimizer step as all ranks see it."""

    losses: list[float]
    total: float
    gradients: GradientReport
    action: str
    """What `BadSteps` made of it: APPLY, SKIP, RETRY or ROLLBACK."""
    stop: str
    writing: bool
    """Whether some rank still writes the checkpoint that was begun."""


class Trainer:
    """Runs a built engine from a state to the end of its schedule, to `stop_at`, or to an agreed stop request."""

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        loader: BatchLoader,
        validation: BatchLoader | None,
        checkpointer: Checkpointer,
        records: Records,
        device: torch.device,
    ) -> None:
        self.config, self.engine, self.loader, self.validation = config, engine, loader, validation
        self.device = device
        self.state = TrainingState()
        self._longest = self._evaluation = 0.0
        self._first = True
        self._checkpointer = checkpointer
        self._reporter = Reporter(config, engine, records, device)
        self._saver = Saver(checkpointer, self._reporter.say, self._save_failed, self._saved)
        self._bad = BadSteps(config)
        mesh, hangs = engine.mesh, Path(config.run_dir) / "hangs"
        self._watchdog = Watchdog(hangs, mesh.rank, mesh.world_size, config.faults.hang_timeout)

    def run(self, state: TrainingState, stop: StopRequest) -> str:
        """Trains from `state` on. Returns why it ended: "finished", "stop_at" or a stop request's reason, on all ranks
        alike. Raises TrainingError on a step that is not finite, and when the last checkpoint cannot be written; TakenOver,
        with nothing written any more, when a later start of the job goes on with the run."""
        training = self.config.training
        self.state = state
        self._saver.start(state.step)
        self._bad.restart(state.recent)
        last = min(training.steps, training.stop_at or training.steps)
        if state.step > last:
            raise TrainingError(
                f"the run in {self.config.run_dir} is at step {state.step}, beyond training.steps ({training.steps}) or "
                f"training.stop_at ({training.stop_at}); raise them, or use another run_dir"
            )
        self._reporter.start(state.step)
        profiler = StepProfiler(training.profile, Path(self.config.run_dir), self.engine.mesh.rank)
        self._watchdog.start()
        try:
            if training.dry_run and state.step < last:
                self._dry_run()
            ended = self._loop(last, stop, profiler) or ("finished" if last == training.steps else "stop_at")
            self._watchdog.beat(self.state.step, "save")
            if not self._saver.now(self.state):
                raise TrainingError(
                    f"step {self.state.step}: the last checkpoint could not be written to {self.config.run_dir}/checkpoints; "
                    f"free space there and start again: the run goes on from step {max(self._saver.saved_step, 0)}"
                )
        finally:
            self._watchdog.stop()
            profiler.close()
            self._reporter.close()
        self._reporter.say(f"{ended} at step {self.state.step}")
        return ended

    def _loop(self, last: int, stop: StopRequest, profiler: StepProfiler) -> str | None:
        """Steps up to `last`; the reason of an agreed stop request, or None."""
        first = True
        while self.state.step < last:
            profiler.before(self.state.step + 1)
            result = self._step(stop)
            profiler.after(self.state.step)
            if result.stop == TAKEN_OVER:
                raise TakenOver(self.config.run_dir, stop.taker)
            self._after_step(result, last)
            if first:
                self._settle()
                first = False
            if result.stop and self.state.step < last:
                return result.stop
        return None

    def _settle(self) -> None:
        """After a first step nothing takes long any more: collectives wait a little longer than the watchdog does for a save
        on another rank, no more."""
        timeout = self.config.faults.hang_timeout
        if timeout:
            shorten_timeouts(PATIENCE * timeout + 60)

    def _draw(self) -> StepBatches:
        losses = 1 + self.engine.model.depth
        begun = time.perf_counter()
        try:
            micro = self.loader.step(self.state.next_sample)
        except DataError as error:  # of this rank's part of the files
            raise OwnError(f"step {self.state.step + 1}: {error}") from error
        self._reporter.work.data(time.perf_counter() - begun)
        self._watchdog.beat(self.state.step + 1, "count")
        return assemble(micro, losses, self.engine.mesh, self.device)

    def _dry_run(self) -> None:
        weights = loss_weights(self.config.training.steps, self.config.recycle)
        batches = self._draw()
        dry_run(self.engine, batches, batches.scales(weights, self.engine.mesh.replicas.size))
        self._reporter.work.reset()

    def _step(self, stop: StopRequest) -> StepResult:
        """One optimizer step: draw, forward and backward by micro-batch, agree, update."""
        begun = time.perf_counter()
        step = self.state.step + 1
        self._watchdog.beat(step, "data")
        batches = self._draw()
        weights = loss_weights(step, self.config.recycle)
        self._watchdog.beat(step, "compute")
        sums = self.engine.passes.train(batches.micro, batches.scales(weights, self.engine.mesh.replicas.size))
        self._watchdog.beat(step, "agree")
        shared, stopping, writing = self._agree(sums, stop.poll(self._margin))
        losses = batches.means(shared)
        total_loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.training)
        self._watchdog.beat(step, "update")
        # a depth of no weight may be what is not finite
        self._bad.begin(total_loss if math.isfinite(sum(losses)) else math.nan)
        report = self.engine.gradients.step(self._bad.accept)
        action = self._respond(step)
        if action in (APPLY, SKIP):
            if action == APPLY:
                self._bad.applied(total_loss, report.norm)
            self.state = replace(
                self.state,
                step=step,
                next_sample=self.state.next_sample + self.config.training.global_batch_size,
                skipped=self.state.skipped + (action == SKIP),
                recent=self._bad.recent,
            )
        seconds = time.perf_counter() - begun
        if not self._first:  # which compiles, opens connections, reads what is read once
            self._longest = max(self._longest, seconds)
        self._first = False
        self._reporter.stepped(self.state.step, seconds)
        return StepResult(losses, total_loss, report, action, stopping, writing)

    @property
    def _margin(self) -> float:
        """Seconds before the job's end at which to save and leave."""
        return self.config.faults.stop_margin + 2 * (self._longest + self._saver.longest) + self._evaluation

    def _agree(self, sums: Tensor, reason: str | None) -> tuple[list[float], str, bool]:
        """Sums of the global batch, why to stop ("" for not) and whether any rank still writes a checkpoint: one collective
        over all ranks.

        Host synchronisation, one of two in a step (the other reads the gradient norms): ranks must agree before the update.
        """
        mesh = self.engine.mesh
        said = [*(reason == name for name in REASONS), not self._saver.ended()]
        votes = torch.tensor(said, dtype=torch.float64, device=self.device)
        # every tensor rank of the last stage has the same sums: one of them counts
        counts = mesh.last_stage and mesh.tensor.rank == 0
        shared = torch.cat((sums if counts else torch.zeros_like(sums), votes))
        if mesh.world_size > 1:
            dist.all_reduce(shared)
        values = shared.tolist()
        *asked, writing = values[len(sums) :]
        heard = [name for name, votes in zip(REASONS, asked, strict=True) if votes]
        return values[: len(sums)], heard[-1] if heard else "", bool(writing)

    def _respond(self, step: int) -> str:
        """What is done about the step, on all ranks alike. Saves what came before one that ends the run, and raises."""
        if self._bad.fault is not None:
            self._saver.finish()  # whether there is a checkpoint to go back to is known when it is published
        action = self._bad.respond(rollbacks=self.state.rollbacks, can_roll_back=self._saver.any)
        fault = self._bad.fault
        if fault is None:
            return action
        self._reporter.event(
            fault.kind, f"step {step}: {fault.text}; {_ANSWERS[action]}", step, action=action, score=fault.score
        )
        if action == STOP:
            kept = f"{self.config.run_dir}/checkpoints"
            if self._saver.now(self.state):
                kept += f" holds step {self.state.step}"
            many = f" ({self._bad.in_a_row} steps in a row)" if self._bad.in_a_row > 1 else ""
            key = "training.nonfinite" if fault.kind == "nonfinite" else "faults.spike"
            raise TrainingError(
                f"step {step}: {fault.text}{many}; no weight was changed, {kept}. "
                f"Lower training.learning_rate, or set {key}=skip (or retry, or rollback) to pass over such steps"
            )
        return action

    def _roll_back(self) -> None:
        """Goes on from the newest whole checkpoint with the data after those that led here."""
        bad, jump = self.state.step + 1, self.state.next_sample + self.config.training.global_batch_size
        rollbacks = self.state.rollbacks + 1
        fault = self._bad.fault
        assert fault is not None, "a rollback has a reason"
        # the event that told it lies after the checkpoint, and goes with the steps taken back
        cause = {"reason": fault.kind, "loss_then": fault.loss, "grad_norm_then": fault.norm, "score": fault.score}
        found = self._checkpointer.restore()
        if found is None:
            raise TrainingError(
                f"step {bad}: the checkpoint to go back to has gone from {self.config.run_dir}/checkpoints; start again"
            )
        restored, folder = found
        self.state = replace(restored, next_sample=jump, rollbacks=rollbacks)
        self._saver.forget()
        self._bad.restart(restored.recent)
        passed = jump - restored.next_sample
        self._reporter.rewind(restored.step)
        self._reporter.event(
            "rollback",
            f"back from step {bad} to {folder}; {passed} samples are jumped over (rollback {rollbacks} of "
            f"{self.config.faults.max_rollbacks})",
            restored.step,
            from_step=bad,
            samples=passed,
            **cause,
        )
        self._saver.now(self.state)  # what was decided must outlive a kill

    def _after_step(self, result: StepResult, last: int) -> None:
        """Log, save and evaluate when they are due; a stop request does not wait for an evaluation."""
        training, step = self.config.training, self.state.step
        if result.action == ROLLBACK:
            self._watchdog.beat(step, "save")
            self._roll_back()
        if result.action not in (APPLY, SKIP):
            return
        self._watchdog.beat(step, "log")
        if step % training.log_every == 0 or step in (1, last):
            self._reporter.log(step, result.losses, result.total, result.gradients)
        self._watchdog.beat(step, "save")
        self._saver.finish(writing=result.writing)
        if training.save_every and step % training.save_every == 0:
            self._saver.begin(self.state)
        due = training.eval_every and (step % training.eval_every == 0 or step == last)
        if self.validation is not None and due and not result.stop:
            self._watchdog.beat(step, "evaluate")
            begun = time.perf_counter()
            self._reporter.evaluate(step, self.validation)
            self._evaluation = max(self._evaluation, time.perf_counter() - begun)

    def _saved(self, step: int, waited: float) -> None:
        self._reporter.saved(step, waited)

    def _save_failed(self, step: int) -> None:
        self._reporter.event(
            "save_failed", f"step {step}: the checkpoint could not be written; older ones are whole", step
        )
