"""Connects a run to its batch job: what requests a stop, and which outcome the job's shell gets at the end."""

from __future__ import annotations

import sys
from pathlib import Path

from recycle_ds.config import RecycleError
from recycle_ds.parallel.job import FINISHED, SAVED_FOR_RESTART, STOPPED_BY_USER, Job, ShellNotInformed
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, REASONS, STOP_FILE, StopRequest
from recycle_ds.training.run_context import RunContext

STOP = "stop"
"""A file of this name in run_dir makes the run save and exit without a requeue; a batch job's shell uses another file."""


def stop_request(context: RunContext) -> StopRequest:
    """The stop request of this rank. Only the first rank checks the stop files, the job's end time and the run lock."""
    if not context.mesh.is_first:
        return StopRequest()
    job, own = context.job, {Path(context.config.run_dir) / STOP: STOP_FILE}
    files = {job.stop_file: JOB_SIGNAL} if job.stop_file else {}
    return StopRequest(files | own, job.end, context.taken_by)


def conclude(job: Job, ended: str) -> None:
    """Reports the outcome of a run that ended without an error to the job's shell. Only the first rank's `job` is not empty.

    Requeues the job if its shell has been killed. Raises ShellNotInformed if only the exit code can report the outcome.
    """
    outcome = STOPPED_BY_USER if ended == STOP_FILE else SAVED_FOR_RESTART if ended in REASONS else FINISHED
    reported = job.write_note("outcome", outcome)
    if outcome == SAVED_FOR_RESTART and not job.requeue_if_orphaned() and not reported:
        raise ShellNotInformed(f"{ended}: saved; the outcome for the job's shell cannot be written to {job.folder}")


def print_local_error(error: RecycleError, mesh: Mesh) -> None:
    """Prints an error that only this rank has met; the other ranks see no more than that it has exited."""
    print(f"error: rank {mesh.rank}: {error}", file=sys.stderr, flush=True)
