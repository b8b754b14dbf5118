"""What the first rank writes of a run: its configuration, the metrics log, the summary, and notes for the job's shell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from recycle_ds.config import RunConfig, save_config
from recycle_ds.parallel.job import Job
from recycle_ds.training.reporting.metrics_log import MetricsLog
from recycle_ds.training.reporting.sessions import SessionLog
from recycle_ds.training.state import TrainingState


@dataclass(frozen=True)
class RunLogs:
    """The first rank's logs; the other ranks have none."""

    metrics: MetricsLog | None = None
    sessions: SessionLog | None = None
    job: Job = field(default_factory=Job)

    def end(self, ended: str, step: int, *, refused: bool = False) -> None:
        """Closes the logs and prints the summary of the run so far. ended: why. refused: see `SessionLog.end`."""
        if self.metrics is not None:
            self.metrics.close()
        if self.sessions is not None:
            summary = self.sessions.end(ended, step, refused=refused)
            if summary is not None:
                print(summary, flush=True)


def open_run_logs(
    config: RunConfig,
    job: Job,
    state: TrainingState,
    source: Path | None,
    taken_by: Callable[[], str | None],
    started: float,
) -> RunLogs:
    """Writes the resolved configuration, trims the metrics log to the state, and opens a new session of the summary.

    source: the checkpoint that the run resumes from, if any. taken_by, started: see `SessionLog`.
    """
    training, run_dir = config.training, Path(config.run_dir)
    save_config(config, run_dir / "config.yaml")
    tokens = training.global_batch_size * training.seq_length
    sessions = SessionLog(run_dir, job, tokens_per_step=tokens, target=training.steps, taken_by=taken_by)
    sessions.begin(state.step, started)
    metrics = MetricsLog(run_dir, tensorboard=training.tensorboard, resumed_step=state.step)
    if source is not None:
        metrics.write({"event": "resume", "step": state.step, "checkpoint": str(source)})
    return RunLogs(metrics, sessions, job)
