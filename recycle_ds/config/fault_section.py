"""What a run does about bad steps, hangs, slow ranks and the end of its job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recycle_ds.config.section import NonNegative, Section

Policy = Literal["stop", "skip", "retry", "rollback"]


class FaultConfig(Section):
    """Faults that a run meets by itself; none of these keys changes what a run without faults computes."""

    spike: Literal["ignore", "skip", "retry", "rollback"] = "ignore"
    """What all ranks do when the loss or the gradient norm jumps; what the words mean: `training.nonfinite`."""
    spike_score: Annotated[float, Field(ge=3)] = 10.0
    """How many robust standard deviations above the recent median are a jump."""
    spike_window: Annotated[int, Field(ge=16)] = 64
    """Recent steps that the median and the deviation are taken over; 16 must have been taken before anything is judged."""
    max_rollbacks: NonNegative = 3
    """Rollbacks of a run, restarts included, before a bad step stops it after all."""
    hang_timeout: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds without progress after which every rank writes its stacks to run_dir/hangs/ and leaves, so that the job restarts;
    the first step, saves and evaluations may take four times as long. 0 waits for ever."""
    straggler_ratio: Annotated[float, Field(gt=1)] = 1.5
    """A rank whose own work takes this many times the median is named in the log."""
    stop_margin: Annotated[float, Field(ge=0)] = 60.0
    """Seconds before the end of the SLURM job at which a run saves and leaves, beside twice what a step and a save took."""
