"""torch.profiler traces of selected steps."""

from __future__ import annotations

from pathlib import Path

import torch

from recycle_ds.config import ProfileConfig
from recycle_ds.training.observers import Observer, RunEnd, StepEnd, StepStart


class StepProfiler(Observer):
    """Traces steps start..end of `config` to run_dir/profile/rank-00000.json; does nothing if there is none."""

    every_rank = True
    on_error = "drop"

    def __init__(self, config: ProfileConfig | None, run_dir: Path, rank: int) -> None:
        self._config = config
        self._path = run_dir / "profile" / f"rank-{rank:05d}.json"
        self._profiler: torch.profiler.profile | None = None

    def before_step(self, start: StepStart) -> None:
        """Starts tracing before the first selected step, or a later one at which the run resumed."""
        if self._config is not None and self._profiler is None and self._config.start <= start.step <= self._config.end:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def after_step(self, end: StepEnd) -> None:
        """Stops after the last selected step and writes the trace."""
        if self._config is not None and end.completed >= self._config.end:
            self._close()

    def at_end(self, end: RunEnd) -> None:
        """Writes the trace, if one is being recorded."""
        self._close()

    def _close(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None
            self._config = None
