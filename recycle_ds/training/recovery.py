"""What all ranks do about a bad step: they skip it, retry it, roll back to a checkpoint, or stop."""

from __future__ import annotations

from dataclasses import replace

from recycle_ds.config import RunConfig
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.faults.bad_steps import RETRY, ROLLBACK, SKIP, STOP, BadSteps
from recycle_ds.training.observers import ROLLBACK as ROLLBACK_EVENT
from recycle_ds.training.observers import Event
from recycle_ds.training.observers.dispatch import Observers
from recycle_ds.training.saving import Saver
from recycle_ds.training.state import Checkpointer, TrainingState

_ACTION_TEXTS = {
    SKIP: "the step and its data are skipped",
    RETRY: "no weight was changed, the step is retried with the same data",
    ROLLBACK: "rolling back to the newest checkpoint",
    STOP: "the run stops",
}


class Recovery:
    """Responds to what `bad` has found. Every method is collective over all ranks."""

    def __init__(
        self, config: RunConfig, bad: BadSteps, saver: Saver, checkpointer: Checkpointer, observers: Observers
    ) -> None:
        self._config, self._bad, self._saver = config, bad, saver
        self._checkpointer, self._observers = checkpointer, observers

    def respond(self, state: TrainingState) -> str:
        """The action for the step after `state`: APPLY, SKIP, RETRY or ROLLBACK.

        If the run must stop, saves the state before the step and raises TrainingError."""
        step, fault = state.step + 1, self._bad.fault
        if fault is not None:
            self._saver.finish()  # publishes a pending checkpoint: it may be the one to roll back to
        action = self._bad.respond(rollbacks=state.rollbacks, can_roll_back=self._saver.has_checkpoint)
        if fault is None:
            return action
        details = {"action": action, "score": fault.score}
        self._observers.at_event(
            Event(fault.kind, step, f"step {step}: {fault.text}; {_ACTION_TEXTS[action]}", details)
        )
        if action == STOP:
            folder = f"{self._config.run_dir}/checkpoints"
            kept = f"step {state.step} is in {folder}" if self._saver.save_now(state) else f"{folder}: saving failed"
            kept = kept if state.step else "there is no checkpoint yet"
            repeats = f" ({self._bad.in_a_row} steps in a row)" if self._bad.in_a_row > 1 else ""
            key = "training.nonfinite" if fault.kind == "nonfinite" else "faults.spike"
            raise TrainingError(
                f"step {step}: {fault.text}{repeats}; no weight was changed, {kept}. "
                f"Lower training.learning_rate, or set {key}=skip (or retry, or rollback) to continue after such steps"
            )
        return action

    def roll_back(self, state: TrainingState) -> TrainingState:
        """Restores the newest intact checkpoint. Returns its state, with the data after those of the bad step after `state`."""
        bad_step, next_sample = state.step + 1, state.next_sample + self._config.training.global_batch_size
        rollbacks = state.rollbacks + 1
        fault = self._bad.fault
        assert fault is not None, "a rollback has a reason"
        # the fault's own event is later than the checkpoint, so rewinding the metrics removes it
        cause = {"reason": fault.kind, "loss_then": fault.loss, "grad_norm_then": fault.norm, "score": fault.score}
        found = self._checkpointer.restore()
        if found is None:
            raise TrainingError(
                f"step {bad_step}: no checkpoint to roll back to is left in {self._config.run_dir}/checkpoints; restart the run"
            )
        restored, folder = found
        state = replace(restored, next_sample=next_sample, rollbacks=rollbacks)
        self._saver.forget()
        self._bad.restart(restored.recent)
        skipped = next_sample - restored.next_sample
        text = (
            f"rolled back from step {bad_step} to {folder}; {skipped} samples are skipped (rollback {rollbacks} of "
            f"{self._config.faults.max_rollbacks})"
        )
        details = {"from_step": bad_step, "samples": skipped, **cause}
        self._observers.at_event(Event(ROLLBACK_EVENT, restored.step, text, details))
        self._saver.save_now(state)  # the decision must survive a kill
        return state
