"""The training loop. Schedules, clipping, checkpoints, bad steps and what watches the run are in modules of their own.

A step is launched, and ends when the host knows its losses and norms. On a GPU, where nothing has to follow at once, the next
step is launched before that: the GPU then always has work, and decides itself that a step that is not finite changes nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from recycle_ds.data.errors import DataError
from recycle_ds.data.loader import Batch, BatchLoader
from recycle_ds.parallel.agree import on_all_ranks
from recycle_ds.parallel.device import download
from recycle_ds.parallel.peers import TakenOver
from recycle_ds.training.batches import StepBatches, assemble
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.engine.dry_run import dry_run
from recycle_ds.training.engine.gradients import GradientReport
from recycle_ds.training.engine.validation import evaluate
from recycle_ds.training.errors import LocalError, TrainingError
from recycle_ds.training.faults.bad_steps import APPLY, ROLLBACK, SKIP, BadSteps
from recycle_ds.training.faults.stop_requests import STOP_FILE, TAKEN_OVER, StopRequest
from recycle_ds.training.launched import Launched, Shared, agreed, runs_ahead, share, total_loss
from recycle_ds.training.observers import EvaluationEnd, LoggedStep, PhaseStart, RunEnd, RunStart, StepEnd, StepStart
from recycle_ds.training.observers.dispatch import Observers
from recycle_ds.training.observers.records import Phase
from recycle_ds.training.recovery import Recovery
from recycle_ds.training.saving import Saver
from recycle_ds.training.schedule import learning_rate, loss_weights
from recycle_ds.training.state import Checkpointer, TrainingState


@dataclass(frozen=True)
class _Ended:
    """A step that has ended, the same on all ranks."""

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
        self._last = 0
        self._runs_ahead = runs_ahead(engine.mesh.device)
        self._open: Launched | None = None
        """The step before the next one, if it has not ended."""
        self._resumed = 0.0
        """When the loop went on after the latest step that has ended."""
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
            # of a step that has not ended nothing is known
            known = self.state if self._open is None else self._open.before
            self._observers.at_end(RunEnd.by(error, known.step, self._steps))
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
        self._last = last
        ended = self._loop(stop) or ("finished" if last == training.steps else "stop_at")
        self._enter(self.state.step, "save")
        if not self._saver.save_now(self.state):
            raise TrainingError(
                f"step {self.state.step}: the last checkpoint could not be written to {self.config.run_dir}/checkpoints; "
                f"free space there and restart: the run resumes from step {max(self._saver.saved_step, 0)}"
            )
        on_all_ranks(lambda: self._observers.check(self.state.step), mesh)
        return ended

    def _loop(self, stop: StopRequest) -> str | None:
        """Runs steps up to the last one. Returns the reason of an agreed stop request, or None."""
        while self.state.step < self._last:
            self._steps += 1
            self._observers.before_step(StepStart(self.state.step + 1, self._steps))
            reason = self._step(stop)
            if reason and self.state.step < self._last:
                return reason
        return None

    def _step(self, stop: StopRequest) -> str:
        """One optimizer step: draw, forward and backward by micro-batch, agree, update. Ends the step before it, if that is
        open, and this one if something has to follow it at once. Returns the agreed reason to stop, "" for none."""
        start = time.perf_counter()
        step = self.state.step + 1
        self._enter(step, "data")
        micro = self._draw()
        self._enter(step, "count")
        batches = self._assemble(micro)
        weights = tuple(loss_weights(step, self.config.recycle))
        self._enter(step, "compute")
        sums = self.engine.passes.train(batches.micro, batches.scales(weights, self.engine.mesh.replicas.size))
        self._enter(step, "agree")
        reason = ""
        if self._open is not None:
            before = self._end(self._open, stop)
            self._after_step(before, is_open=before.end.action == APPLY)
            if before.end.action != APPLY:
                return before.stop
            reason = before.stop
        wanted, writing = self._reason_to_stop(stop), not self._saver.ended()
        shared = share(sums, wanted, writing=writing, mesh=self.engine.mesh)
        launched = self._update(shared, batches, weights, start)
        if reason or self._is_due(launched):
            ended = self._end(launched, stop)
            self._after_step(ended)
            return ended.stop or reason
        self._open = launched
        self.state = self._state_after(launched, APPLY)
        return ""

    def _update(self, shared: Shared, batches: StepBatches, weights: tuple[float, ...], start: float) -> Launched:
        """Launches the update, which the device leaves out if the losses or gradients are not finite."""
        step = self.state.step + 1
        rate = learning_rate(step, self.config.training)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self._enter(step, "update")
        accept = None
        if self._waits_for_norms:
            sums, counts = download(shared.sums, batches.counts)()
            self._bad.begin(total_loss(batches.means(sums, counts), weights))
            accept = self._bad.accept
        report = self.engine.gradients.step(shared.sums.isfinite().all(), accept)
        read = download(shared.sums, shared.votes, batches.counts, report)
        return Launched(self.state, self._steps, start, weights, rate, read)

    @property
    def _waits_for_norms(self) -> bool:
        """Whether the host judges a step before its update, because spikes count as bad."""
        return self.config.faults.spike != "ignore"

    def _is_due(self, launched: Launched) -> bool:
        """Whether a step has to end before the next one is launched: it is the first or the last one, or it is logged, saved or
        evaluated."""
        training, step = self.config.training, launched.step
        periods = (training.log_every, training.save_every, training.eval_every)
        is_due = any(period and step % period == 0 for period in periods)
        is_due |= training.profile is not None and step in (training.profile.start - 1, training.profile.end)
        is_due |= launched.number == 1 or step in (1, self._last)
        return is_due or self._waits_for_norms or not self._runs_ahead

    def _end(self, launched: Launched, stop: StopRequest) -> _Ended:
        """Waits for a step's numbers, and responds to a bad step. Drops the gradients of the step after it then."""
        sums, votes, counts, numbers = launched.read()
        is_open, self._open = launched is self._open, None
        stopping, writing = agreed(votes)
        if stopping == TAKEN_OVER:
            raise TakenOver(self.config.run_dir, stop.taker)
        losses = StepBatches.means(sums, counts)
        loss, report = total_loss(losses, launched.weights), GradientReport.of(numbers)
        self._bad.begin(loss)
        is_good = self._bad.accept(report.norm)
        assert is_good == report.applied, "the host and the device disagree on a step"
        if is_open and not is_good:
            self.engine.gradients.drop()
            self._steps -= 1  # the step that was launched after this one is run again
        self.state = launched.before
        action = self._recovery.respond(launched.before)
        if action == APPLY:
            self._bad.applied(loss, report.norm)
        self.state = self._state_after(launched, action)
        now = time.perf_counter()
        seconds, self._resumed = now - max(launched.start, self._resumed), now
        end = StepEnd(
            step=launched.step,
            number=launched.number,
            action=action,
            completed=self.state.step,
            loss=loss,
            losses=tuple(losses),
            grad_norm=report.norm,
            grad_norm_by_part=report.by_part,
            learning_rate=launched.rate,
            seconds=seconds,
        )
        return _Ended(end, stopping, writing)

    def _state_after(self, launched: Launched, action: str) -> TrainingState:
        """The state after a step. After one that is repeated or rolled back, the one before it."""
        before = launched.before
        if action not in (APPLY, SKIP):
            return before
        return replace(
            before,
            step=before.step + 1,
            next_sample=before.next_sample + self.config.training.global_batch_size,
            skipped=before.skipped + (action == SKIP),
            recent=self._bad.recent,
        )

    def _after_step(self, result: _Ended, *, is_open: bool = False) -> None:
        """Logs, saves and evaluates when due; a stop request does not wait for an evaluation. is_open: the next step has been
        launched, and nothing is due."""
        training, end, step = self.config.training, result.end, result.end.step
        if not is_open:  # else it is part of the next one's phases
            self._enter(step, "log")
        self._observers.after_step(end)
        if end.action == ROLLBACK:
            self._enter(step, "save")
            self.state = self._recovery.roll_back(self.state)
        if end.action in (APPLY, SKIP):
            if step % training.log_every == 0 or step in (1, self._last):
                self._observers.at_log(LoggedStep(step, self._observers.figures(end)))
            if not is_open:
                self._enter(step, "save")
                self._saver.finish(writing=result.writing)
            elif self._saver.is_saving and not result.writing:
                self._enter(step + 1, "save")  # publishing may take long
                self._saver.finish()
                self._enter(step + 1, "agree")
            if training.save_every and step % training.save_every == 0:
                self._saver.begin(self.state)
            due = training.eval_every and (step % training.eval_every == 0 or step == self._last)
            if self.validation is not None and due and not result.stop:
                self._enter(step, "evaluate")
                self._evaluate(step, self.validation)
        self._resumed = time.perf_counter()

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
