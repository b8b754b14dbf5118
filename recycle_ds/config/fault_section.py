"""How a run handles bad steps, hangs, slow ranks and the end of its job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recycle_ds.config.section import NonNegative, Section

Policy = Literal["stop", "skip", "retry", "rollback"]


class FaultConfig(Section):
    """Handling of faults during a run. None of these keys changes the results of a run without faults."""

    spike: Literal["ignore", "skip", "retry", "rollback"] = "ignore"
    """What all ranks do when the loss or the gradient norm spikes; for the values see `training.nonfinite`."""
    spike_score: Annotated[float, Field(ge=3)] = 10.0
    """Robust standard deviations above the recent median from which a value is a spike."""
    spike_window: Annotated[int, Field(ge=16)] = 64
    """Recent applied steps that the median and the deviation are computed over; no spike is detected before the first 16."""
    max_rollbacks: NonNegative = 3
    """Rollbacks of a run, counted across restarts, before a bad step stops it."""
    hang_timeout: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds without progress after which every rank writes its stack traces to run_dir/hangs/ and exits, so that the job
    restarts; the first step, saves and evaluations may take four times as long. 0 disables the watchdog."""
    straggler_ratio: Annotated[float, Field(gt=1)] = 1.5
    """A rank whose own work takes more than this many times its peers' median is reported."""
    stop_margin: Annotated[float, Field(ge=0)] = 60.0
    """Seconds before the end of the SLURM job at which a run saves and exits, plus three of the longest steps and two saves."""
