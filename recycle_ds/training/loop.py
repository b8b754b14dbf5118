"""The training loop. Schedules, clipping, metrics, checkpoints and signals are in modules of their own."""

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
from recycle_ds.parallel.device import upload
from recycle_ds.parallel.peers import TakenOver
from recycle_ds.parallel.rendezvous import shorten_timeouts
from recycle_ds.training.batches import StepBatches, assemble
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.engine.dry_run import dry_run
from recycle_ds.training.engine.gradients import GradientReport
from recycle_ds.training.errors import LocalError, TrainingError
from recycle_ds.training.faults.bad_steps import APPLY, RETRY, ROLLBACK, SKIP, STOP, BadSteps
from recycle_ds.training.faults.stop_requests import REASONS, TAKEN_OVER, StopRequest
from recycle_ds.training.faults.watchdog import PATIENCE, Watchdog
from recycle_ds.training.reporting.profiling import StepProfiler
from recycle_ds.training.reporting.reporter import Reporter
from recycle_ds.training.reporting.run_logs import RunLogs
from recycle_ds.training.saving import Saver
from recycle_ds.training.schedule import learning_rate, loss_weights
from recycle_ds.training.state import Checkpointer, TrainingState

_ACTION_TEXTS = {
    SKIP: "the step and its data are skipped",
    RETRY: "no weight was changed, the step is retried with the same data",
    ROLLBACK: "rolling back to the newest checkpoint",
    STOP: "the run stops",
}


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, the same on all ranks."""

    losses: list[float]
    total: float
    gradients: GradientReport
    action: str
    """What `BadSteps` decided: APPLY, SKIP, RETRY or ROLLBACK."""
    stop: str
    writing: bool
    """Whether some rank is still writing the checkpoint that was started."""


class Trainer:
    """Runs a built engine from a state to the end of its schedule, to `stop_at`, or to an agreed stop request."""

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        loader: BatchLoader,
        validation: BatchLoader | None,
        checkpointer: Checkpointer,
        records: RunLogs,
        device: torch.device,
    ) -> None:
        self.config, self.engine, self.loader, self.validation = config, engine, loader, validation
        self.device = device
        self.state = TrainingState()
        self._longest_step = self._longest_evaluation = 0.0
        self._first = True
        self._checkpointer = checkpointer
        self._reporter = Reporter(config, engine, records, device)
        self._saver = Saver(checkpointer, self._reporter.say, self._save_failed, self._reporter.saved)
        self._bad = BadSteps(config)
        mesh, hangs = engine.mesh, Path(config.run_dir) / "hangs"
        self._watchdog = Watchdog(hangs, mesh.rank, mesh.world_size, config.faults.hang_timeout)

    def run(self, state: TrainingState, stop: StopRequest) -> str:
        """Trains from `state`. Returns why it ended, the same on all ranks: "finished", "stop_at" or a stop request's reason.
        Raises TrainingError on a bad step that the run must stop at, and if the last checkpoint cannot be written;
        TakenOver, without writing anything more, if a later start of the job has taken over the run."""
        training = self.config.training
        self.state = state
        self._saver.start(state.step)
        self._bad.restart(state.recent)
        last = min(training.steps, training.stop_at or training.steps)
        if state.step > last:
            limit = f"training.steps ({last})" if last == training.steps else f"training.stop_at ({last})"
            raise TrainingError(
                f"the run in {self.config.run_dir} is at step {state.step}, beyond {limit}; raise it, or use another run_dir"
            )
        self._reporter.start(state.step)
        profiler = StepProfiler(training.profile, Path(self.config.run_dir), self.engine.mesh.rank)
        self._watchdog.start()
        try:
            if training.dry_run and state.step < last:
                self._dry_run()
            ended = self._loop(last, stop, profiler) or ("finished" if last == training.steps else "stop_at")
            self._watchdog.beat(self.state.step, "save")
            if not self._saver.save_now(self.state):
                raise TrainingError(
                    f"step {self.state.step}: the last checkpoint could not be written to {self.config.run_dir}/checkpoints; "
                    f"free space there and restart: the run resumes from step {max(self._saver.saved_step, 0)}"
                )
        finally:
            self._watchdog.stop()
            profiler.close()
            self._reporter.close()
        key = "training.steps" if ended == "finished" else "training.stop_at"
        idle = f"; nothing was left to do: raise {key}, or use another run_dir" if state.step == last else ""
        self._reporter.say(f"{ended} at step {self.state.step}{idle}")
        return ended

    def _loop(self, last: int, stop: StopRequest, profiler: StepProfiler) -> str | None:
        """Runs steps up to `last`. Returns the reason of an agreed stop request, or None."""
        first = True
        while self.state.step < last:
            profiler.before(self.state.step + 1)
            result = self._step(stop)
            profiler.after(self.state.step)
            if result.stop == TAKEN_OVER:
                raise TakenOver(self.config.run_dir, stop.taker)
            self._after_step(result, last)
            if first:
                self._shorten_timeouts()
                first = False
            if result.stop and self.state.step < last:
                return result.stop
        return None

    def _shorten_timeouts(self) -> None:
        """After the first step, shortens the timeout of collectives to a little more than the watchdog allows a save on
        another rank."""
        timeout = self.config.faults.hang_timeout
        if timeout:
            shorten_timeouts(PATIENCE * timeout + 60)

    def _draw(self) -> StepBatches:
        losses = 1 + self.engine.model.depth
        start = time.perf_counter()
        try:
            micro = self.loader.step(self.state.next_sample)
        except DataError as error:  # in the part of the files that only this rank reads
            raise LocalError(f"step {self.state.step + 1}: {error}") from error
        self._reporter.work.data(time.perf_counter() - start)
        self._watchdog.beat(self.state.step + 1, "count")
        return assemble(micro, losses, self.engine.mesh, self.device, self.engine.model.counted_tokens)

    def _dry_run(self) -> None:
        weights = loss_weights(self.config.training.steps, self.config.recycle)
        batches = self._draw()
        dry_run(self.engine, batches, batches.scales(weights, self.engine.mesh.replicas.size))
        self._reporter.work.reset()

    def _step(self, stop: StopRequest) -> StepResult:
        """One optimizer step: draw, forward and backward by micro-batch, agree, update."""
        start = time.perf_counter()
        step = self.state.step + 1
        self._watchdog.beat(step, "data")
        batches = self._draw()
        weights = loss_weights(step, self.config.recycle)
        self._watchdog.beat(step, "compute")
        sums = self.engine.passes.train(batches.micro, batches.scales(weights, self.engine.mesh.replicas.size))
        self._watchdog.beat(step, "agree")
        shared, stopping, writing = self._agree(sums, stop.poll(self._margin))
        losses = batches.means(shared)
        total_loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=False))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.training)
        self._watchdog.beat(step, "update")
        # a depth whose weight is 0 may be the one that is not finite
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
        seconds = time.perf_counter() - start
        if not self._first:  # the first step compiles, opens connections, fills caches
            self._longest_step = max(self._longest_step, seconds)
        self._first = False
        self._reporter.stepped(self.state.step, seconds)
        return StepResult(losses, total_loss, report, action, stopping, writing)

    @property
    def _margin(self) -> float:
        """Seconds before the job's end at which to save and exit."""
        return (
            self.config.faults.stop_margin + 2 * (self._longest_step + self._saver.longest) + self._longest_evaluation
        )

    def _agree(self, sums: Tensor, reason: str | None) -> tuple[list[float], str, bool]:
        """Sums of the global batch, the reason to stop ("" for none), and whether any rank is still writing a checkpoint.
        One collective over all ranks.

        One of two host synchronisations in a step (the other reads the gradient norms): ranks must agree before the
        update."""
        mesh = self.engine.mesh
        flags = [*(reason == name for name in REASONS), not self._saver.ended()]
        votes = upload(torch.tensor(flags, dtype=torch.float64), self.device)
        # every tensor rank of the last stage has the same sums: only one of them may count
        counts = mesh.last_stage and mesh.tensor.rank == 0
        shared = torch.cat((sums if counts else torch.zeros_like(sums), votes))
        if mesh.world_size > 1:
            dist.all_reduce(shared)
        values = shared.tolist()
        *counted, writing = values[len(sums) :]
        reasons = [name for name, count in zip(REASONS, counted, strict=True) if count]
        return values[: len(sums)], reasons[-1] if reasons else "", bool(writing)

    def _respond(self, step: int) -> str:
        """The action for the step, the same on all ranks. STOP saves the state before the step and raises TrainingError."""
        if self._bad.fault is not None:
            self._saver.finish()  # publishes a pending checkpoint: it may be the one to roll back to
        action = self._bad.respond(rollbacks=self.state.rollbacks, can_roll_back=self._saver.has_checkpoint)
        fault = self._bad.fault
        if fault is None:
            return action
        self._reporter.event(
            fault.kind, f"step {step}: {fault.text}; {_ACTION_TEXTS[action]}", step, action=action, score=fault.score
        )
        if action == STOP:
            folder, before = f"{self.config.run_dir}/checkpoints", self.state.step
            kept = f"step {before} is in {folder}" if self._saver.save_now(self.state) else f"{folder}: saving failed"
            kept = kept if before else "there is no checkpoint yet"
            repeats = f" ({self._bad.in_a_row} steps in a row)" if self._bad.in_a_row > 1 else ""
            key = "training.nonfinite" if fault.kind == "nonfinite" else "faults.spike"
            raise TrainingError(
                f"step {step}: {fault.text}{repeats}; no weight was changed, {kept}. "
                f"Lower training.learning_rate, or set {key}=skip (or retry, or rollback) to continue after such steps"
            )
        return action

    def _roll_back(self) -> None:
        """Resumes from the newest intact checkpoint, with the data after those of the bad step."""
        bad_step, next_sample = self.state.step + 1, self.state.next_sample + self.config.training.global_batch_size
        rollbacks = self.state.rollbacks + 1
        fault = self._bad.fault
        assert fault is not None, "a rollback has a reason"
        # the fault's own event is later than the checkpoint, so rewinding the metrics removes it
        cause = {"reason": fault.kind, "loss_then": fault.loss, "grad_norm_then": fault.norm, "score": fault.score}
        found = self._checkpointer.restore()
        if found is None:
            raise TrainingError(
                f"step {bad_step}: no checkpoint to roll back to is left in {self.config.run_dir}/checkpoints; restart the run"
            )
        restored, folder = found
        self.state = replace(restored, next_sample=next_sample, rollbacks=rollbacks)
        self._saver.forget()
        self._bad.restart(restored.recent)
        skipped = next_sample - restored.next_sample
        self._reporter.rewind(restored.step)
        self._reporter.event(
            "rollback",
            f"rolled back from step {bad_step} to {folder}; {skipped} samples are skipped (rollback {rollbacks} of "
            f"{self.config.faults.max_rollbacks})",
            restored.step,
            from_step=bad_step,
            samples=skipped,
            **cause,
        )
        self._saver.save_now(self.state)  # the decision must survive a kill

    def _after_step(self, result: StepResult, last: int) -> None:
        """Logs, saves and evaluates when due; a stop request does not wait for an evaluation."""
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
            start = time.perf_counter()
            self._reporter.evaluate(step, self.validation)
            self._longest_evaluation = max(self._longest_evaluation, time.perf_counter() - start)

    def _save_failed(self, step: int) -> None:
        self._reporter.event(
            "save_failed", f"step {step}: the checkpoint could not be written; older ones are intact", step
        )
