"""Between a run and the batch job that it is part of: what asks it to stop, and what the job's shell is told at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from recycle_ds.config import RecycleError, RunConfig
from recycle_ds.parallel.job import FINISHED, LEFT, STOPPED, Job, Unheard
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, REASONS, STOP_FILE, StopRequest

STOP = "stop"
"""A file of this name in run_dir makes the run save and leave for good; the shell of a batch job has one of its own."""


def stop_request(config: RunConfig, mesh: Mesh, job: Job, taken_by: Callable[[], str | None]) -> StopRequest:
    """The first rank looks at the stop files, at the clock and at the lock; the others hear of it."""
    if not mesh.is_first:
        return StopRequest()
    files = {job.stop_file: JOB_SIGNAL} if job.stop_file else {}
    return StopRequest(files | {Path(config.run_dir) / STOP: STOP_FILE}, job.end, taken_by)


def conclude(job: Job, ended: str) -> None:
    """Tells the shell how a run ended that made no error; on the first rank, whose `job` is not empty.

    Requeues the job where its shell has been killed. Raises Unheard when the shell must be told otherwise.
    """
    outcome = LEFT if ended == STOP_FILE else STOPPED if ended in REASONS else FINISHED
    heard = job.tell("outcome", outcome)
    if outcome == STOPPED and not job.requeue_if_orphaned() and not heard:
        raise Unheard(f"{ended}: saved; the job's shell cannot be told in {job.folder}")


def tell_alone(error: RecycleError, mesh: Mesh) -> None:
    """What only this rank knows, printed here; the others know no more than that it has gone."""
    print(f"error: rank {mesh.rank}: {error}", file=sys.stderr, flush=True)
