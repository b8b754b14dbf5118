"""What the parts of a run share from its start to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recycle_ds.config import RunConfig
from recycle_ds.parallel.job import Job
from recycle_ds.parallel.mesh import Mesh


@dataclass(frozen=True)
class RunContext:
    """A run on this rank: its settings, its place among the ranks, its job. It is built once, complete, and does not change.
    `TrainingEngine` has it."""

    config: RunConfig
    """With `model.vocab_size`."""
    deepspeed_config: Mapping[str, Any]
    """DeepSpeed's settings, as `resolve_deepspeed` returns them for `config`."""
    mesh: Mesh
    job: Job = field(default_factory=Job)
    """The batch job; an empty one on all ranks but the first, which alone reports to it."""
    taken_by: Callable[[], str | None] = lambda: None
    """Names the later start that has taken over the run folder; None while there is none, and on all ranks but the first."""
    started: float = field(default_factory=time.time)
    """Unix time."""
