"""The observers that every run has, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recycle_ds.config import save_config
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.faults.slow_ranks import SlowRanks
from recycle_ds.training.faults.stop_requests import StopRequest
from recycle_ds.training.faults.timeouts import CollectiveTimeouts
from recycle_ds.training.faults.watchdog import Watchdog
from recycle_ds.training.observers import Observer
from recycle_ds.training.observers.dispatch import Observers
from recycle_ds.training.observers.loading import users_observers
from recycle_ds.training.reporting.compile_time import CompileTime
from recycle_ds.training.reporting.console import RunConsole
from recycle_ds.training.reporting.metrics_log import MetricsLog
from recycle_ds.training.reporting.profiling import StepProfiler
from recycle_ds.training.reporting.sessions import SessionLog
from recycle_ds.training.reporting.step_figures import StepFigures
from recycle_ds.training.reporting.summary import Summary
from recycle_ds.training.reporting.tensorboard import TensorBoard
from recycle_ds.training.reporting.weights_and_biases import WeightsAndBiases
from recycle_ds.training.run_context import RunContext
from recycle_ds.training.state import TrainingState


def open_run_logs(context: RunContext, state: TrainingState, source: Path | None) -> list[Observer]:
    """The logs of rank 0. Writes the resolved configuration, trims the metrics log to the state, and opens a new session of the
    summary.

    source: the checkpoint that the run resumes from, if any.
    """
    training, run_dir, job = context.config.training, Path(context.config.run_dir), context.job
    save_config(context.config, run_dir / "config.yaml")
    tokens = training.global_batch_size * training.seq_length
    sessions = SessionLog(run_dir, job, tokens_per_step=tokens, target=training.steps, taken_by=context.taken_by)
    sessions.begin(state.step, context.started)
    metrics = MetricsLog(run_dir, resumed_step=state.step)
    if source is not None:
        metrics.write({"event": "resume", "step": state.step, "checkpoint": str(source)})
    boards: list[Observer] = [TensorBoard(run_dir)] if training.tensorboard else []
    if training.wandb is not None:
        boards.append(WeightsAndBiases(run_dir, training.wandb))
    return [metrics, *boards, RunConsole(training.steps), Summary(sessions, job)]


def observers_of_run(
    engine: TrainingEngine, stop: StopRequest, logs: Sequence[Observer], given: Sequence[Observer]
) -> Observers:
    """All observers of a run on this rank, in the order in which they are called: heartbeats and stop requests first, then
    what makes figures, what writes them, and the user's. logs: those of `open_run_logs`, on rank 0. given: the user's, called
    after those of the configuration. Raises ConfigError if one of the configuration's cannot be created."""
    config, mesh = engine.context.config, engine.mesh
    faults, run_dir = config.faults, Path(config.run_dir)
    # a pipeline, which is never compiled, calls the module and not the engine
    timed = engine.engine if mesh.pipeline.size == 1 else engine.model
    own: list[Observer] = [
        Watchdog(run_dir / "hangs", mesh.rank, mesh.world_size, faults.hang_timeout),
        CollectiveTimeouts(faults.hang_timeout),
        stop,
        StepProfiler(config.training.profile, run_dir, mesh.rank),
        StepFigures(config, mesh, engine.model.depth),
        SlowRanks(timed, mesh, faults.straggler_ratio),
        *logs,
        *([CompileTime(engine.compilation.report)] if mesh.is_first else []),
    ]
    return Observers([*own, *users_observers(config.training, given, first=mesh.is_first)], mesh)
