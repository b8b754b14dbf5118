"""The training loop. Schedules, clipping, checkpoints, bad steps and what watches the run are in modules of their own."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.data.errors import DataError
from recycle_ds.data.loader import Batch, BatchLoader
from recycle_ds.parallel.agree import on_all_ranks
from recycle_ds.parallel.device import upload
from recycle_ds.parallel.peers import TakenOver
from recycle_ds.training.batches import StepBatches, assemble
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.engine.dry_run import dry_run
from recycle_ds.training.engine.validation import evaluate
from recycle_ds.training.errors import LocalError, TrainingError
from recycle_ds.training.faults.bad_steps import APPLY, ROLLBACK, SKIP, BadSteps
from recycle_ds.training.faults.stop_requests import REASONS, STOP_FILE, TAKEN_OVER, StopRequest
from recycle_ds.training.observers import EvaluationEnd, LoggedStep, PhaseStart, RunEnd, RunStart, StepEnd, StepStart
from recycle_ds.training.observers.dispatch import Observers
from recycle_ds.training.observers.records import Phase
from recycle_ds.training.recovery import Recovery
from recycle_ds.training.saving import Saver
from recycle_ds.training.schedule import learning_rate, loss_weights
from recycle_ds.training.state import Checkpointer, TrainingState


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, the same on all ranks."""

    end: StepEnd
    stop: str
    """The reason to stop that the ranks agreed on; "" for none."""
    writing: bool
    """Whether some rank is still writing the checkpoint that was started."""


class Trainer:
    """Runs a built engine from a state to the end of its schedule, to `stop_at`, or to an agreed stop request."""

    def __init__(
        self,
        engine: TrainingEngine,
        loader: BatchLoader,
        validation: BatchLoader | None,
        checkpointer: Checkpointer,
        observers: Observers,
    ) -> None:
        config = engine.context.config
        self.config, self.engine, self.loader, self.validation = config, engine, loader, validation
        self.state = TrainingState()
        self._steps = 0
        """Steps of this start, repeated ones included."""
        self._observers = observers
        self._saver = Saver(checkpointer, observers)
        self._bad = BadSteps(config)
        self._recovery = Recovery(config, self._bad, self._saver, checkpointer, observers)

    def run(self, state: TrainingState, stop: StopRequest) -> str:
        """Trains from `state`. Returns why it ended, the same on all ranks: "finished", "stop_at" or a stop request's reason.
        Raises TrainingError on a bad step that the run must stop at, and if the last checkpoint cannot be written;
        TakenOver, without writing anything more, if a later start of the job has taken over the run."""
        try:
            ended = self._run(state, stop)
        except BaseException as error:
            self._observers.at_end(RunEnd.by(error, self.state.step, self._steps))
            raise
        self._observers.at_end(RunEnd(self.state.step, ended, self._steps))
        return ended

    def _run(self, state: TrainingState, stop: StopRequest) -> str:
        training, mesh = self.config.training, self.engine.mesh
        self.state = state
        self._saver.start(state.step)
        self._bad.restart(state.recent)
        last = min(training.steps, training.stop_at or training.steps)
        if state.step > last:
            limit = f"training.steps ({last})" if last == training.steps else f"training.stop_at ({last})"
            raise TrainingError(
                f"the run in {self.config.run_dir} is at step {state.step}, beyond {limit}; raise it, or use another run_dir"
            )
        start = RunStart(self.config, self.engine.model, state.step, last)
        on_all_ranks(lambda: self._observers.at_start(start), mesh)
        if training.dry_run and state.step < last:
            self._dry_run()
        ended = self._loop(last, stop) or ("finished" if last == training.steps else "stop_at")
        self._enter(self.state.step, "save")
        if not self._saver.save_now(self.state):
            raise TrainingError(
                f"step {self.state.step}: the last checkpoint could not be written to {self.config.run_dir}/checkpoints; "
                f"free space there and restart: the run resumes from step {max(self._saver.saved_step, 0)}"
            )
        on_all_ranks(lambda: self._observers.check(self.state.step), mesh)
        return ended

    def _loop(self, last: int, stop: StopRequest) -> str | None:
        """Runs steps up to `last`. Returns the reason of an agreed stop request, or None."""
        while self.state.step < last:
            self._steps += 1
            self._observers.before_step(StepStart(self.state.step + 1, self._steps))
            result = self._step(stop)
            if result.stop == TAKEN_OVER:
                raise TakenOver(self.config.run_dir, stop.taker)
            self._after_step(result, last)
            if result.stop and self.state.step < last:
                return result.stop
        return None

    def _step(self, stop: StopRequest) -> StepResult:
        """One optimizer step: draw, forward and backward by micro-batch, agree, update."""
        start = time.perf_counter()
        step = self.state.step + 1
        self._enter(step, "data")
        micro = self._draw()
        self._enter(step, "count")
        batches = self._assemble(micro)
        weights = loss_weights(step, self.config.recycle)
        self._enter(step, "compute")
        sums = self.engine.passes.train(batches.micro, batches.scales(weights, self.engine.mesh.replicas.size))
        self._enter(step, "agree")
        shared, stopping, writing = self._agree(sums, self._reason_to_stop(stop))
        losses = batches.means(shared)
        # confidence losses, which come last, carry no weight
        total_loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=False))
        rate = learning_rate(step, self.config.training)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self._enter(step, "update")
        # a depth whose weight is 0 may be the one that is not finite
        self._bad.begin(total_loss if math.isfinite(sum(losses)) else math.nan)
        report = self.engine.gradients.step(self._bad.accept)
        action = self._recovery.respond(self.state)
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
        end = StepEnd(
            step=step,
            number=self._steps,
            action=action,
            completed=self.state.step,
            loss=total_loss,
            losses=tuple(losses),
            grad_norm=report.norm,
            grad_norm_by_part=report.by_part,
            learning_rate=rate,
            seconds=time.perf_counter() - start,
        )
        return StepResult(end, stopping, writing)

    def _after_step(self, result: StepResult, last: int) -> None:
        """Logs, saves and evaluates when due; a stop request does not wait for an evaluation."""
        training, end, step = self.config.training, result.end, result.end.step
        self._enter(step, "log")
        self._observers.after_step(end)
        if end.action == ROLLBACK:
            self._enter(step, "save")
            self.state = self._recovery.roll_back(self.state)
        if end.action not in (APPLY, SKIP):
            return
        if step % training.log_every == 0 or step in (1, last):
            self._observers.at_log(LoggedStep(step, self._observers.figures(end)))
        self._enter(step, "save")
        self._saver.finish(writing=result.writing)
        if training.save_every and step % training.save_every == 0:
            self._saver.begin(self.state)
        due = training.eval_every and (step % training.eval_every == 0 or step == last)
        if self.validation is not None and due and not result.stop:
            self._enter(step, "evaluate")
            self._evaluate(step, self.validation)

    def _evaluate(self, step: int, validation: BatchLoader) -> None:
        start = time.perf_counter()
        # at most about one pass over the files
        available = sum(validation.dataset.samples_per_epoch) // validation.global_batch_size
        batches = min(self.config.training.eval_batches, max(1, available))
        found = evaluate(self.engine, validation, batches)
        line: dict[str, object] = {
            "step": step,
            "eval_loss": found.loss,  # the backbone's
            "eval_recycle_loss": found.recycle_loss,
            "eval_acceptance": found.acceptance,
        }
        if found.tokens_per_full_call is not None:
            line["eval_tokens_per_full_call"] = found.tokens_per_full_call
        self._observers.after_evaluation(EvaluationEnd(step, line, time.perf_counter() - start))

    def _dry_run(self) -> None:
        weights = loss_weights(self.config.training.steps, self.config.recycle)
        batches = self._assemble(self._draw())
        dry_run(self.engine, batches, batches.scales(weights, self.engine.mesh.replicas.size))

    def _draw(self) -> list[Batch]:
        """This rank's micro-batches of the next step, on the host."""
        try:
            return self.loader.step(self.state.next_sample)
        except DataError as error:  # in the part of the files that only this rank reads
            raise LocalError(f"step {self.state.step + 1}: {error}") from error

    def _assemble(self, micro: list[Batch]) -> StepBatches:
        model = self.engine.model
        return assemble(micro, 1 + model.depth, self.engine.mesh, model.loss_settings.counted_tokens)

    def _enter(self, step: int, phase: Phase) -> None:
        self._observers.at_phase(PhaseStart(step, phase))

    def _reason_to_stop(self, stop: StopRequest) -> str | None:
        """This rank's reason. A failed observer is one: the run is saved before it ends with the observer's error."""
        reason = stop.poll(self.config.faults.stop_margin + stop.needed)
        return STOP_FILE if self._observers.failure is not None and reason != TAKEN_OVER else reason

    def _agree(self, sums: Tensor, reason: str | None) -> tuple[list[float], str, bool]:
        """Sums of the global batch, the reason to stop ("" for none), and whether any rank is still writing a checkpoint.
        One collective over all ranks.

        One of two host synchronisations in a step (the other reads the gradient norms): ranks must agree before the
        update."""
        mesh = self.engine.mesh
        flags = [*(reason == name for name in REASONS), not self._saver.ended()]
        votes = upload(torch.tensor(flags, dtype=torch.float64), mesh.device)
        # every tensor rank of the last stage has the same sums: only one of them may count
        counts = mesh.last_stage and mesh.tensor.rank == 0
        shared = torch.cat((sums if counts else torch.zeros_like(sums), votes))
        if mesh.world_size > 1:
            dist.all_reduce(shared)
        values = shared.tolist()
        *counted, writing = values[len(sums) :]
        reasons = [name for name, count in zip(REASONS, counted, strict=True) if count]
        return values[: len(sums)], reasons[-1] if reasons else "", bool(writing)
